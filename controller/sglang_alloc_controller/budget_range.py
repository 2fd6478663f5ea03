"""Control story, fourth step: positions from floor (0) to ceiling (1) become budgets. Pure."""

from typing import NamedTuple


class BudgetRange(NamedTuple):
    """The budgets one phase may have, in activations per token over all MoE layers."""

    floor: int
    ceiling: int

    @property
    def smallest_step(self) -> float:
        """One activation, as a share of the range."""
        return 1.0 / max(1, self.ceiling - self.floor)

    def budget(self, position: float) -> int:
        """Return the budget nearest to `position`, from 0 (floor) to 1 (ceiling)."""
        return self.floor + round(position * (self.ceiling - self.floor))

    def position(self, budget: int) -> float:
        """Return where `budget` lies; one outside counts as the nearer end."""
        if self.ceiling == self.floor:
            return 1.0
        return min(1.0, max(0.0, (budget - self.floor) / (self.ceiling - self.floor)))

    def snapped(self, position: float) -> float:
        """Return the position of the nearest budget."""
        return self.position(self.budget(min(1.0, max(0.0, position))))
