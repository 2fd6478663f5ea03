"""Simulator, fourth step: what a law is, and ours: production's own code. Pure."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from sglang_alloc.shared_table import CalmBudgets
from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.control_core import ControlCore
from sglang_alloc_controller.samples import PHASES, Phase, Reading
from sglang_alloc_controller.settings import Settings

Budgets = tuple[int, int]
"""(prefill, decode), activations per token over all MoE layers."""


class Order(NamedTuple):
    """The budgets that a law wants in force, and those of calm steps where they are others."""

    budgets: Budgets
    calm: CalmBudgets | None = None


class Scrape(NamedTuple):
    """What the controller's poller holds: the newest reading and the failures so far."""

    reading: Reading | None
    failures_total: int


class Law(Protocol):
    """Anything that moves the budgets by what it can read."""

    def tick(self, now_seconds: float, scrape: Scrape) -> Order:
        """Return the budgets that are to be in force from now on."""


class OurLaw:
    """The controller's own readings, windows and law; nothing of them is repeated here."""

    def __init__(self, settings: Settings, ranges: Mapping[Phase, BudgetRange]) -> None:
        """Begin at the ceiling at second 0."""
        ceilings = {phase: ranges[phase].ceiling for phase in PHASES}
        self.core = ControlCore(settings, ranges, ceilings, 0.0)

    def tick(self, now_seconds: float, scrape: Scrape) -> Order:
        """Take a new reading in and let the law decide."""
        reading = scrape.reading
        if reading is not None and reading is not self.core.history.newest:
            self.core.take_in(reading, after_failure=scrape.failures_total > 0)
        decision = self.core.decide(self.core.seen(now_seconds))
        budgets = self.core.budgets(decision)
        return Order((budgets["prefill"], budgets["decode"]), self.core.calm_budgets(decision))


class StaticLaw:
    """The same budgets always."""

    def __init__(self, budgets: Budgets) -> None:
        """Take the budgets."""
        self._budgets = budgets

    def tick(self, now_seconds: float, scrape: Scrape) -> Order:
        """Return them."""
        return Order(self._budgets)


class Schedule:
    """Budgets that were chosen beforehand, for intervals of equal length."""

    def __init__(self, interval_seconds: float, budgets: tuple[Budgets, ...]) -> None:
        """Take the budgets of every interval; the last go on."""
        self._interval_seconds = interval_seconds
        self._budgets = budgets

    def tick(self, now_seconds: float, scrape: Scrape) -> Order:
        """Return those of the interval."""
        interval = int(now_seconds / self._interval_seconds + 1e-9)
        return Order(self._budgets[min(interval, len(self._budgets) - 1)])
