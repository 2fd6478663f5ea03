"""Simulator, fifth step: how long somebody was served below full quality. Pure.

It is the controller's own definition (`TickReport.is_below_full`), but for one thing: time without
work counts too. A phase is below full while its budget is, in busy and calm steps alike; where its
calm budget is full, only between two looks with tokens of that phase in busy steps.
"""

from sglang_alloc_controller.simulator.engine import Engine
from sglang_alloc_controller.simulator.laws import Order


class BelowFull:
    """The time of one run, looked at tick by tick."""

    def __init__(self, budget_max: int) -> None:
        """Begin at second 0."""
        self._budget_max = budget_max
        self._at_seconds = 0.0
        self._busy_tokens = (0, 0)
        self.seconds = 0.0

    def add(self, now_seconds: float, engine: Engine, order: Order) -> None:
        """Count the time since the last look, in which `order` was in force."""
        busy_tokens = engine.busy_tokens
        calm = order.budgets if order.calm is None else order.calm[:2]
        phases = zip(order.budgets, calm, busy_tokens, self._busy_tokens, strict=True)
        if any(
            budget < self._budget_max and (of_calm < self._budget_max or tokens > before)
            for budget, of_calm, tokens, before in phases
        ):
            self.seconds += now_seconds - self._at_seconds
        self._at_seconds, self._busy_tokens = now_seconds, busy_tokens
