"""Control story, second step: the last minutes of readings, and what they say about each SLO."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from typing import NamedTuple

from sglang_alloc_controller import histogram_window
from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.samples import SLOS, InputState, RankTime, Reading, Slo
from sglang_alloc_controller.settings import FreshnessSettings, SloSettings


class Sample(NamedTuple):
    """What one latency looked like in the window just past."""

    events: float
    """Number of events in the window."""
    independent_events: float
    """Number of them that chance treats apart: the tokens of one decode step come together."""
    within_ratio: float | None
    """Share of them within the SLO; None when the SLO is not a bucket edge."""
    mean_seconds: float
    quantile_seconds: float
    """Estimate of the latency that the objective's share stays under."""
    rate_per_second: float
    """Events per second in the window."""
    span_seconds: float
    """Length of the window."""


class Newest(NamedTuple):
    """What happened between the last two readings."""

    seconds: float
    requests: float
    """Requests that got their first token."""
    missed_ratio: float
    """Share of the events beyond the SLO, of the latency that was worse."""
    work: RankTime = RankTime()
    """What the engine did, summed over ranks; nothing: the server does not tell."""


class _Entry(NamedTuple):
    """A reading and its totals, which every look at the window needs."""

    reading: Reading
    events: Mapping[Slo, float]

    @property
    def taken_at_seconds(self) -> float:
        return self.reading.taken_at_seconds


class ReadingHistory:
    """Readings of one life of the engine, oldest first, and when it last did something."""

    def __init__(self, law: LawSettings, freshness: FreshnessSettings) -> None:
        """Start without readings."""
        self._law = law
        self._freshness = freshness
        self._entries: list[_Entry] = []
        self._times: list[float] = []  # when each of them was taken
        self._events: dict[Slo, list[float]] = {slo: [] for slo in SLOS}  # of each of them
        self._found: dict[tuple[object, ...], Sample | None] = {}  # of the newest reading
        self._active_at_seconds = -math.inf
        self.restarted_at_seconds = -math.inf

    def take_settings(self, law: LawSettings, freshness: FreshnessSettings) -> None:
        """Judge the same readings by other settings from now on."""
        self._law = law
        self._freshness = freshness
        self._found.clear()

    @property
    def newest(self) -> Reading | None:
        """The newest reading, if there is one."""
        return self._entries[-1].reading if self._entries else None

    def add(self, reading: Reading, *, after_failure: bool) -> bool:
        """Take a reading in; return True when the engine started anew before it.

        The first reading after failures is taken as a start, since the controller was there
        first. A reading that is not newer than the last one is dropped.
        """
        last = self._entries[-1] if self._entries else None
        if last is not None and reading.taken_at_seconds <= last.taken_at_seconds:
            return False
        entry = _Entry(reading, {slo: reading.event_count(slo) for slo in SLOS})
        anew = after_failure if last is None else _restarted(last.reading, reading)
        if anew:
            self._forget(len(self._entries))
            self.restarted_at_seconds = reading.taken_at_seconds
        busy = reading.running_requests > 0 or reading.queue_requests > 0
        if last is None or busy or entry.events != last.events:
            self._active_at_seconds = reading.taken_at_seconds
        self._entries.append(entry)
        self._times.append(reading.taken_at_seconds)
        for slo, events in entry.events.items():
            self._events[slo].append(events)
        self._found.clear()
        self._drop_old(reading.taken_at_seconds)
        return anew

    def input_state(self, now_seconds: float) -> InputState:
        """Judge the readings at `now_seconds` of the monotonic clock."""
        newest = self.newest
        if newest is None:
            return InputState.STALE
        if now_seconds - newest.taken_at_seconds > self._freshness.stale_after_seconds:
            return InputState.STALE
        quiet_seconds = newest.taken_at_seconds - self._active_at_seconds
        if quiet_seconds >= self._freshness.idle_after_seconds:
            return InputState.IDLE
        return InputState.VALID

    def is_warming_up(self, now_seconds: float) -> bool:
        """Tell whether the engine started so recently that its latencies say nothing."""
        return now_seconds - self.restarted_at_seconds < self._freshness.warmup_seconds

    def sample(
        self, slo: Slo, settings: SloSettings, since_seconds: float, window_seconds: float
    ) -> Sample | None:
        """Return the events of the window, which begins no earlier than `since_seconds`.

        The window is `window_seconds` long and grows to `window_max_seconds` while it holds fewer
        than `min_samples` events. None: no window, no events, or no such SLO.
        """
        threshold = settings.ttft_seconds if slo == "ttft" else settings.itl_seconds
        objective = settings.objective_ratio
        newest, older = self.newest, self._window_start(slo, since_seconds, window_seconds)
        if newest is None or older is None or threshold is None:
            return None
        # Soon after a change, windows of every length begin at the same reading.
        asked = (slo, threshold, objective, older.taken_at_seconds)
        if asked not in self._found:
            self._found[asked] = _sample(slo, older, newest, threshold, objective)
        return self._found[asked]

    def between_last_two(self, settings: SloSettings) -> Newest | None:
        """Return what happened between the last two readings; None: nothing to tell."""
        if len(self._entries) < 2:
            return None
        older, newer = self._entries[-2], self._entries[-1]
        thresholds = {"ttft": settings.ttft_seconds, "itl": settings.itl_seconds}
        missed = []
        for slo in SLOS:
            events = histogram_window.events_between(
                older.reading.series(slo), newer.reading.series(slo)
            )
            threshold = thresholds[slo]
            if events is None or threshold is None:
                continue
            within = histogram_window.within_ratio(events, threshold)
            if within is not None:
                missed.append(1.0 - within)
        if not missed:
            return None
        return Newest(
            newer.taken_at_seconds - older.taken_at_seconds,
            newer.events["ttft"] - older.events["ttft"],
            max(missed),
            _work(older.reading, newer.reading),
        )

    def event_rate(self, slo: Slo) -> float:
        """Return the events per second of the long window, whatever changed in it: the load."""
        if not self._entries:
            return 0.0
        newest = self._entries[-1]
        start_seconds = newest.taken_at_seconds - self._law.long_window_seconds
        older = self._entries[bisect_left(self._times, start_seconds)]
        span_seconds = newest.taken_at_seconds - older.taken_at_seconds
        events = newest.events[slo] - older.events[slo]
        return events / span_seconds if span_seconds > 0 else 0.0

    def _window_start(
        self, slo: Slo, since_seconds: float, window_seconds: float
    ) -> Reading | None:
        first = bisect_left(self._times, since_seconds)
        last = len(self._entries) - 1
        if first >= last:
            return None
        newest = self._entries[-1]
        # Going back, the span and the events grow, so both are searched by halves.
        long_enough = bisect_right(self._times, newest.taken_at_seconds - window_seconds) - 1
        enough_events = newest.events[slo] - self._law.min_samples
        rich_enough = bisect_right(self._events[slo], enough_events) - 1
        return self._entries[max(first, min(long_enough, rich_enough, last - 1))].reading

    def _drop_old(self, now_seconds: float) -> None:
        horizon_seconds = now_seconds - self._law.window_max_seconds
        # The last one before the horizon stays: it is where the longest window begins.
        old = min(bisect_right(self._times, horizon_seconds) - 1, len(self._times) - 2)
        if old > 0:
            self._forget(old)

    def _forget(self, oldest: int) -> None:
        """Drop so many of the oldest readings."""
        del self._entries[:oldest], self._times[:oldest]
        for events in self._events.values():
            del events[:oldest]


def _work(older: Reading, newer: Reading) -> RankTime:
    before, after = older.rank_times, newer.rank_times
    if before.keys() != after.keys():
        return RankTime()
    pairs = [(before[rank], after[rank]) for rank in after]
    fields = range(len(RankTime._fields))
    return RankTime(*(sum(new[i] - old[i] for old, new in pairs) for i in fields))


def _restarted(older: Reading, newer: Reading) -> bool:
    # An engine that joins may bring counters of a long life, which no reading here has seen grow.
    return older.engines != newer.engines or any(
        histogram_window.restarted(older.series(slo), newer.series(slo)) for slo in SLOS
    )


def _sample(
    slo: Slo, older: Reading, newer: Reading, threshold_seconds: float, objective_ratio: float
) -> Sample | None:
    events = histogram_window.events_between(older.series(slo), newer.series(slo))
    if events is None or events.counts[-1] <= 0:
        return None
    span_seconds = newer.taken_at_seconds - older.taken_at_seconds
    return Sample(
        events=events.counts[-1],
        independent_events=events.counts[-1] / (1.0 if slo == "ttft" else _batch(older, newer)),
        within_ratio=histogram_window.within_ratio(events, threshold_seconds),
        mean_seconds=histogram_window.mean_seconds(events) or 0.0,
        quantile_seconds=histogram_window.quantile_seconds(events, objective_ratio) or 0.0,
        rate_per_second=events.counts[-1] / span_seconds,
        span_seconds=span_seconds,
    )


def _batch(older: Reading, newer: Reading) -> float:
    """Return the mean decode batch, roughly: the running requests at both ends of the window."""
    return max(1.0, (older.running_requests + newer.running_requests) / 2)
