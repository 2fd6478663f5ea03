"""Control story, second step: the last minute of readings, and what they say about each SLO."""

import math
from collections import deque
from typing import NamedTuple

from sglang_alloc_controller import histogram_window
from sglang_alloc_controller.samples import InputState, Reading, Slo
from sglang_alloc_controller.settings import FreshnessSettings, LawSettings, SloSettings


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


class ReadingHistory:
    """Readings of one life of the engine, oldest first, and when it last did something."""

    def __init__(self, law: LawSettings, freshness: FreshnessSettings) -> None:
        """Start without readings."""
        self._law = law
        self._freshness = freshness
        self._readings: deque[Reading] = deque()
        self._active_at_seconds = -math.inf
        self.restarted_at_seconds = -math.inf

    @property
    def newest(self) -> Reading | None:
        """The newest reading, if there is one."""
        return self._readings[-1] if self._readings else None

    def add(self, reading: Reading, *, after_failure: bool) -> bool:
        """Take a reading in; return True when the engine started anew before it.

        The first reading after failures is taken as a start, since the controller was there
        first. A reading that is not newer than the last one is dropped.
        """
        previous = self.newest
        if previous is not None and reading.taken_at_seconds <= previous.taken_at_seconds:
            return False
        anew = after_failure if previous is None else _restarted(previous, reading)
        if anew:
            self._readings.clear()
            self.restarted_at_seconds = reading.taken_at_seconds
        busy = reading.running_requests > 0 or reading.queue_requests > 0
        if previous is None or busy or _counts(reading) != _counts(previous):
            self._active_at_seconds = reading.taken_at_seconds
        self._readings.append(reading)
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
        newest = self.newest
        if newest is None or threshold is None:
            return None
        older = self._window_start(slo, newest, since_seconds, window_seconds)
        if older is None:
            return None
        return _sample(slo, older, newest, threshold, settings.objective_ratio)

    def event_rate(self, slo: Slo) -> float:
        """Return the events per second of the long window, whatever changed in it: the load."""
        newest = self.newest
        if newest is None:
            return 0.0
        start_seconds = newest.taken_at_seconds - self._law.long_window_seconds
        older = next(one for one in self._readings if one.taken_at_seconds >= start_seconds)
        span_seconds = newest.taken_at_seconds - older.taken_at_seconds
        events = newest.event_count(slo) - older.event_count(slo)
        return events / span_seconds if span_seconds > 0 else 0.0

    def _window_start(
        self, slo: Slo, newest: Reading, since_seconds: float, window_seconds: float
    ) -> Reading | None:
        start = None
        for older in reversed(self._readings):
            if older.taken_at_seconds < since_seconds:
                break
            if older is newest:
                continue
            start = older
            span_seconds = newest.taken_at_seconds - older.taken_at_seconds
            events = newest.event_count(slo) - older.event_count(slo)
            if span_seconds >= window_seconds and events >= self._law.min_samples:
                break
        return start

    def _drop_old(self, now_seconds: float) -> None:
        horizon_seconds = now_seconds - self._law.window_max_seconds
        # The last one before the horizon stays: it is where the longest window begins.
        while len(self._readings) > 2 and self._readings[1].taken_at_seconds <= horizon_seconds:
            self._readings.popleft()


def _counts(reading: Reading) -> tuple[float, float]:
    return reading.event_count("ttft"), reading.event_count("itl")


def _restarted(older: Reading, newer: Reading) -> bool:
    return any(
        histogram_window.restarted(older.series(slo), newer.series(slo)) for slo in ("ttft", "itl")
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
