"""Control story, before the first step: what an engine step takes, by batch and budget. Pure.

Measured points are joined by straight lines, along the batch (or the tokens of a prefill) and along
the budget; nothing is assumed about their order, so a budget may be slower than a larger one.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# A smaller batch than the smallest measured one cannot be cheaper than this share of it.
_SMALLEST_SHARE = 0.2
# However large the gain, a budget cannot make a step free.
_FASTEST_RATIO = 0.05


class PhaseTimes(NamedTuple):
    """Step times of one phase on a grid."""

    sizes: tuple[float, ...]
    """Ascending: running requests of a decode step, or prompt tokens of a prefill step."""
    budgets: tuple[int, ...]
    """Ascending, in activations per token; the last is full."""
    seconds: tuple[tuple[float, ...], ...]
    """One row per size, one column per budget."""

    def at(self, size: float, budget: float) -> float:
        """Return the seconds of a step of this size at this budget."""
        return self.line(budget).at(size)

    def line(self, budget: float) -> "Line":
        """Return the times by size at one budget; budgets outside the grid count as its ends."""
        return Line(self.sizes, tuple(_between(self.budgets, row, budget) for row in self.seconds))

    def ratio(self, size: float, budget: float) -> float:
        """Return the time at this budget over that at full budget."""
        return self.at(size, budget) / self.at(size, self.budgets[-1])

    def scaled(self, gain: float) -> "PhaseTimes":
        """Return times that the budget changes `gain` times as much; those at full stay."""
        return self._replace(seconds=tuple(tuple(with_gain(row, gain)) for row in self.seconds))


class Line(NamedTuple):
    """Step times by size at one budget."""

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, size: float) -> float:
        """Return the seconds of a step of this size."""
        return times_at(self.sizes, (self.seconds,), size)[0]


def with_gain(steps_seconds: Sequence[float], gain: float) -> list[float]:
    """Return step times by budget, the last being full, for one that saves `gain` times as much."""
    full = steps_seconds[-1]
    return [max(_FASTEST_RATIO * full, full + gain * (step - full)) for step in steps_seconds]


def times_at(sizes: Sequence[float], rows: Sequence[Sequence[float]], size: float) -> list[float]:
    """Return the seconds of a step at each budget; a row has the times of one, by size.

    Beyond the measured sizes the nearest slope goes on. But a smaller step never costs less than in
    proportion: where long prompts cost more than that, the slope would lead to nothing.
    """
    if len(sizes) == 1:
        return [row[0] for row in rows]
    right = min(max(bisect_right(sizes, size), 1), len(sizes) - 1)
    left = right - 1
    width, beyond = sizes[right] - sizes[left], size - sizes[left]
    least = max(_SMALLEST_SHARE, min(1.0, size / sizes[0]))
    return [
        max(row[left] + (row[right] - row[left]) / width * beyond, least * row[0]) for row in rows
    ]


@dataclass(frozen=True)
class StepTimes:
    """What a server's engine steps cost; `source` says where the figures come from."""

    prefill: PhaseTimes
    decode: PhaseTimes
    source: str

    def scaled(self, gain: float) -> "StepTimes":
        """Return a plant on which the budget changes the times `gain` times as much."""
        return StepTimes(self.prefill.scaled(gain), self.decode.scaled(gain), self.source)


def _between(points: Sequence[int], values: Sequence[float], at: float) -> float:
    if at <= points[0]:
        return values[0]
    if at >= points[-1]:
        return values[-1]
    right = bisect_right(points, at)
    share = (at - points[right - 1]) / (points[right] - points[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])
