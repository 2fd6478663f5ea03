"""Control story, second step, beside the samples: the work that came, over many windows.

Kept longer than the readings themselves, because a load that does not change is known the better
the longer it is counted; a few numbers of each reading are enough for that.
"""

import math
from array import array
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_alloc_controller.samples import Reading

# From "a burst has just begun" to "it has been like this for a quarter of an hour".
WINDOWS_SECONDS = (
    3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 13.0, 17.0, 22.0, 28.0, 36.0, 46.0, 60.0, 80.0, 100.0, 130.0,
    170.0, 220.0, 290.0, 400.0, 600.0, 900.0,
)  # fmt: skip
# Arrivals are counted by pieces of so long, to see how evenly they come, over so many at most.
_PIECE_SECONDS, _PIECES_MAX, _PIECES_MIN = 10.0, 90, 18
_ARRIVALS_MIN = 50.0
# A window that is not much longer than the one before it says nothing new.
_LONGER_RATIO = 1.15
_WINDOWS_BACK = np.array(WINDOWS_SECONDS)
_PIECES_BACK = _PIECE_SECONDS * np.arange(1, _PIECES_MAX + 1)


class LoadWindow(NamedTuple):
    """What came and what was done in the seconds just past."""

    seconds: float
    arrivals: float
    """Requests that came: those that got their first token, and what the queue grew by."""
    requests: float
    """Requests that got their first token."""
    prefill_tokens: float
    """Prompt tokens that were computed."""
    decode_tokens: float
    """Tokens generated after the first of their request."""


class LoadHistory:
    """Totals of the readings of one life of the engine, oldest first.

    Of several engines that are read as one, it is the load of the average one: budgets are chosen
    by what one engine carries.
    """

    def __init__(self) -> None:
        """Begin without readings."""
        # Totals by reading, in arrays, which numpy reads without a copy at each look.
        self._times = array("d")
        self._queue = array("d")
        self._requests = array("d")  # that got their first token
        self._prefill_tokens = array("d")
        self._decode_tokens = array("d")
        self._windows: tuple[LoadWindow, ...] | None = None
        self._engines = 1

    def clear(self) -> None:
        """Forget everything: the engine began anew."""
        for column in self._columns():
            del column[:]
        self._windows = None

    def _columns(self) -> tuple["array[float]", ...]:
        """Return the totals: times, queues, and what the windows tell behind the arrivals."""
        return (
            self._times,
            self._queue,
            self._requests,
            self._prefill_tokens,
            self._decode_tokens,
        )

    def add(self, reading: Reading, queue_requests: float) -> None:
        """Take a reading in, with its queue; one that tells no prompt tokens is left out."""
        if reading.prefill_tokens is None:
            return
        self._engines = reading.engines
        self._times.append(reading.taken_at_seconds)
        self._queue.append(queue_requests)
        self._requests.append(reading.event_count("ttft") / reading.engines)
        self._prefill_tokens.append(reading.prefill_tokens / reading.engines)
        self._decode_tokens.append(reading.event_count("itl") / reading.engines)
        old = bisect_left(self._times, reading.taken_at_seconds - 1.1 * WINDOWS_SECONDS[-1])
        for column in self._columns() if old else ():
            del column[:old]
        self._windows = None

    def windows(self) -> tuple[LoadWindow, ...]:
        """Return the load of every window that the history fills, the shortest first."""
        if self._windows is None:
            self._windows = self._found() if len(self._times) > 1 else ()
        return self._windows

    def dispersion(self) -> float:
        """Return the variance of the arrivals over their mean, as far as it is surely below 1.

        1 is Poisson, what is more even is less: behind a round-robin balancer about one over the
        number of servers. By the squared differences d of the counts n in m successive pieces of
        the last quarter of an hour, which a load that moves hardly changes,

            dispersion = mean(d^2) / 2 / mean(n),   with two standard errors of sqrt(3 / m) added

        Of several engines that are read as one it is the dispersion of their sum.
        """
        if len(self._times) < 2:
            return 1.0
        counts = self._counts_by_piece()
        arrivals = float(counts.sum())
        if len(counts) < _PIECES_MIN or arrivals < _ARRIVALS_MIN:
            return 1.0
        differences = counts[1:] - counts[:-1]
        squares = float((differences * differences).sum()) / len(differences)
        dispersion = squares / 2.0 / (arrivals / len(counts)) * self._engines
        return min(1.0, dispersion * (1.0 + 2.0 * math.sqrt(3.0 / len(counts))))

    def _counts_by_piece(self) -> npt.NDArray[np.float64]:
        """Return the arrivals of successive pieces, the newest first, up to the first gap."""
        times = np.asarray(self._times)
        begins = np.searchsorted(times, times[-1] - _PIECES_BACK - 0.5)
        ends = np.concatenate(([len(times) - 1], begins[:-1]))
        lengths = (times[ends] - times[begins]) / _PIECE_SECONDS
        whole = np.logical_and.accumulate((lengths > 0.5) & (lengths < 1.5))
        arrived = np.asarray(self._requests) + np.asarray(self._queue)
        counts: npt.NDArray[np.float64] = np.maximum(0.0, arrived[ends] - arrived[begins])[whole]
        return counts

    def _found(self) -> tuple[LoadWindow, ...]:
        times = np.asarray(self._times)
        last = len(times) - 1
        starts = np.minimum(np.searchsorted(times, times[-1] - _WINDOWS_BACK - 0.5), last - 1)
        since = [(column[last] - np.asarray(column)[starts]).tolist() for column in self._columns()]
        found, longer_than = list[LoadWindow](), -math.inf
        for seconds, queue, requests, prefill_tokens, decode_tokens in zip(*since, strict=True):
            if seconds > longer_than:
                arrivals = max(0.0, requests + queue)
                found.append(LoadWindow(seconds, arrivals, requests, prefill_tokens, decode_tokens))
                longer_than = _LONGER_RATIO * seconds
        return tuple(found)


class PlausibleQueue:
    """The queue gauge without single absurd values."""

    # A queue does not grow by more to this multiple of what it was, and by so many in a second.
    _GROWTH_RATIO, _GROWTH_PER_SECOND = 2.0, 20.0

    def __init__(self) -> None:
        """Begin without a value."""
        self._accepted, self._at_seconds, self._doubted = 0.0, 0.0, True

    def take(self, queue_requests: float, at_seconds: float) -> float:
        """Return the value, or the last plausible one until the next reading confirms the jump."""
        passed_seconds = max(1.0, at_seconds - self._at_seconds)
        limit = self._GROWTH_RATIO * self._accepted + self._GROWTH_PER_SECOND * passed_seconds
        plausible = self._doubted or queue_requests <= limit
        self._doubted = not plausible
        if plausible:
            self._accepted = queue_requests
        self._at_seconds = at_seconds
        return self._accepted
