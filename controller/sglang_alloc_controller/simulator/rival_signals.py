"""Simulator, rivals: what a law that somebody else would write first reads from the metrics. Pure.

The rivals get the same readings, windows and useful budgets as ours, so that what is compared is
the rule alone. Each has one position from 0 (floor) to 1 (ceiling) for both phases.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.reading_history import ReadingHistory
from sglang_alloc_controller.samples import PHASES, SLOS, InputState, Phase
from sglang_alloc_controller.settings import Settings
from sglang_alloc_controller.simulator.laws import Order, Scrape

_MEDIAN = 0.5


class Observed(NamedTuple):
    """What a rule sees; without any event nothing is late."""

    worst_ratio: float
    """The larger of both latencies' objective quantile over its SLO; 0: no event."""
    medians_seconds: tuple[float, ...]
    """Median TTFT and inter-token latency, those that there are."""


class StepRule(Protocol):
    """A rule that moves one position."""

    period_seconds: float
    """Time between two decisions."""
    window_seconds: float
    """Span of the events it judges."""

    def next(self, position: float, observed: Observed) -> float:
        """Return the position wanted now; one outside 0 and 1 is clamped."""


class RivalLaw:
    """Any rule, on the readings that the controller would have."""

    def __init__(
        self, rule: StepRule, settings: Settings, ranges: Mapping[Phase, BudgetRange]
    ) -> None:
        """Begin at the ceiling."""
        self._rule, self._settings, self._ranges = rule, settings, ranges
        self._history = ReadingHistory(settings.law, settings.freshness)
        self._position = 1.0
        self._next_seconds = 0.0

    def tick(self, now_seconds: float, scrape: Scrape) -> Order:
        """Take a new reading in and decide, when it is time and the readings are fresh."""
        reading = scrape.reading
        if reading is not None and reading is not self._history.newest:
            self._history.add(reading, after_failure=False)
        is_stale = self._history.input_state(now_seconds) is InputState.STALE
        if now_seconds >= self._next_seconds and not is_stale:
            self._next_seconds = now_seconds + self._rule.period_seconds
            wanted = self._rule.next(self._position, self._observed())
            self._position = min(1.0, max(0.0, wanted))
        prefill, decode = (self._ranges[phase].budget(self._position) for phase in PHASES)
        return Order((prefill, decode))

    def _observed(self) -> Observed:
        slo = self._settings.slo
        halves = slo.model_copy(update={"objective_ratio": _MEDIAN})
        limits = {"ttft": slo.ttft_seconds, "itl": slo.itl_seconds}
        ratios, medians = [0.0], []
        newest = self._history.newest
        since = (newest.taken_at_seconds if newest else 0.0) - 1.5 * self._rule.window_seconds
        for name in SLOS:
            late = self._history.sample(name, slo, since, self._rule.window_seconds)
            middle = self._history.sample(name, halves, since, self._rule.window_seconds)
            limit = limits[name]
            if late is None or middle is None or limit is None:
                continue
            ratios.append(late.quantile_seconds / limit)
            medians.append(middle.quantile_seconds)
        return Observed(max(ratios), tuple(medians))
