"""Control story, second step, beside the samples: the work that came, over many windows.

Kept longer than the readings themselves, because a load that does not change is known the better
the longer it is counted; a few numbers of each reading are enough for that.
"""

from bisect import bisect_left
from statistics import median_low
from typing import NamedTuple

from sglang_alloc_controller.samples import Reading

# From "a burst has just begun" to "it has been like this for a quarter of an hour".
WINDOWS_SECONDS = (3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 200.0, 400.0, 900.0)
# A window that is not much longer than the one before it says nothing new.
_LONGER_RATIO = 1.2


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


class _Totals(NamedTuple):
    at_seconds: float
    requests: float
    decode_tokens: float
    prefill_tokens: float
    queue: float


class LoadHistory:
    """Totals of the readings of one life of the engine, oldest first."""

    def __init__(self) -> None:
        """Begin without readings."""
        self._totals: list[_Totals] = []
        self._times: list[float] = []
        self._queues: list[float] = []  # of the last three readings
        self._windows: tuple[LoadWindow, ...] | None = None

    def clear(self) -> None:
        """Forget everything: the engine began anew."""
        self._totals, self._times, self._queues, self._windows = [], [], [], None

    def add(self, reading: Reading) -> None:
        """Take a reading in; one that does not tell the prompt tokens is left out."""
        if reading.prefill_tokens is None:
            return
        # A single absurd value of the gauge is outvoted by its neighbours.
        self._queues = [*self._queues[-2:], reading.queue_requests]
        self._totals.append(
            _Totals(
                reading.taken_at_seconds,
                reading.event_count("ttft"),
                reading.event_count("itl"),
                reading.prefill_tokens,
                median_low(self._queues),
            )
        )
        self._times.append(reading.taken_at_seconds)
        old = bisect_left(self._times, reading.taken_at_seconds - 1.1 * WINDOWS_SECONDS[-1])
        del self._totals[:old], self._times[:old]
        self._windows = None

    def windows(self) -> tuple[LoadWindow, ...]:
        """Return the load of every window that the history fills, the shortest first."""
        if self._windows is None:
            self._windows = self._found() if len(self._totals) > 1 else ()
        return self._windows

    def _found(self) -> tuple[LoadWindow, ...]:
        newest, found = self._totals[-1], list[LoadWindow]()
        for seconds in WINDOWS_SECONDS:
            start = bisect_left(self._times, newest.at_seconds - seconds - 0.5)
            older = self._totals[min(start, len(self._totals) - 2)]
            span = newest.at_seconds - older.at_seconds
            if not found or span > _LONGER_RATIO * found[-1].seconds:
                found.append(_between(older, newest))
        return tuple(found)


def _between(older: _Totals, newer: _Totals) -> LoadWindow:
    requests = newer.requests - older.requests
    return LoadWindow(
        seconds=newer.at_seconds - older.at_seconds,
        arrivals=max(0.0, requests + newer.queue - older.queue),
        requests=requests,
        prefill_tokens=newer.prefill_tokens - older.prefill_tokens,
        decode_tokens=newer.decode_tokens - older.decode_tokens,
    )
