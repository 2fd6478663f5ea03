"""Control story, fourth step: positions from floor (0) to ceiling (1) become budgets. Pure."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sglang_alloc_controller.step_times import PhaseTimes, times_at


class BudgetRange(NamedTuple):
    """The budgets one phase may have, in activations per token over all MoE layers."""

    floor: int
    ceiling: int
    levels: Sequence[int] = ()
    """Ascending, from floor to ceiling: the only budgets that are used, at equal distances of
    position. Empty: every budget of the range."""
    seconds: Sequence[float] = ()
    """Time of a step at each level, at a size that is usual under load. Empty: not known."""
    losses: Sequence[float] = ()
    """Predicted loss of each level, nats per token."""
    sizes: Sequence[float] = ()
    """Sizes at which `step_times` are known: running requests, or prompt tokens."""
    step_times: Sequence[Sequence[float]] = ()
    """Time of a step at each level, by size. Empty: not known."""

    @property
    def smallest_step(self) -> float:
        """One level, or one activation, as a share of the range."""
        count = len(self.levels) if self.levels else self.ceiling - self.floor + 1
        return 1.0 / max(1, count - 1)

    def budget(self, position: float) -> int:
        """Return the budget nearest to `position`, from 0 (floor) to 1 (ceiling)."""
        if self.levels:
            return self.levels[self.level(position)]
        return self.floor + round(position * (self.ceiling - self.floor))

    def level(self, position: float) -> int:
        """Return the number of the level nearest to `position`; 0 is the floor."""
        return round(position * (len(self.levels) - 1))

    def level_position(self, level: int) -> float:
        """Return the position of a level."""
        return level / max(1, len(self.levels) - 1) if len(self.levels) > 1 else 1.0

    def step_seconds(self, level: int, size: float) -> float:
        """Return the time of a step of this size at a level."""
        return times_at(self.sizes, (self.step_times[level],), size)[0]

    def steps_seconds(self, size: float) -> list[float]:
        """Return the time of a step of this size at every level."""
        return times_at(self.sizes, self.step_times, size)

    def position(self, budget: int) -> float:
        """Return where `budget` lies; one outside counts as the nearer end, or level."""
        if self.ceiling == self.floor:
            return 1.0
        if self.levels:
            return self._nearest(budget) / (len(self.levels) - 1)
        return min(1.0, max(0.0, (budget - self.floor) / (self.ceiling - self.floor)))

    def snapped(self, position: float) -> float:
        """Return the position of the nearest budget."""
        return self.position(self.budget(min(1.0, max(0.0, position))))

    def _nearest(self, budget: int) -> int:
        above = min(bisect_left(self.levels, budget), len(self.levels) - 1)
        below = max(0, above - 1)
        nearer_above = self.levels[above] - budget <= budget - self.levels[below]
        return above if nearer_above else below


def by_speed(
    bounds: BudgetRange,
    times: PhaseTimes,
    size: float,
    loss_at: Callable[[int], float],
    levels_max: int,
) -> BudgetRange:
    """Return a range whose levels get faster from the ceiling down, by about equal amounts.

    Budgets that are no faster than a larger one are left out: on some engines giving up a little
    is slower than giving up nothing. The floor is then the fastest budget that is left.
    `size` is that of a usual step under load, `loss_at` the predicted loss of a budget.
    """

    def seconds_at(budget: int) -> float:
        return times.at(size, budget)

    useful = [bounds.ceiling]
    for budget in range(bounds.ceiling - 1, bounds.floor - 1, -1):
        if seconds_at(budget) < seconds_at(useful[-1]):
            useful.append(budget)
    slowest, fastest = seconds_at(useful[0]), seconds_at(useful[-1])
    chosen = {bounds.ceiling}
    for number in range(1, levels_max):
        wanted = slowest + (fastest - slowest) * number / (levels_max - 1)
        chosen.add(min(useful, key=lambda one: (abs(seconds_at(one) - wanted), -one)))
    levels = tuple(sorted(chosen))
    return BudgetRange(
        levels[0],
        bounds.ceiling,
        levels,
        tuple(seconds_at(budget) for budget in levels),
        tuple(loss_at(budget) for budget in levels),
        times.sizes,
        tuple(times.line(budget).seconds for budget in levels),
    )
