"""Offline story, profiling: which probes tell the sensitivities, as rows of kept slots by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_alloc.errors import ConfigurationError

Context = Literal["isolated", "target", "paper", "lexi"]

Matrix = npt.NDArray[np.float64]


class ProbePlan(NamedTuple):
    """Rows to measure, and which of them hold layer l at its c-th measured choice.

    `rows` (P, L) are mean kept slots, the last row full everywhere; `cells` (L, M) are row numbers;
    `measured` are the M kept-slot counts, ascending and ending at K.
    """

    rows: Matrix
    cells: npt.NDArray[np.intp]
    measured: tuple[float, ...]

    @property
    def full_row(self) -> int:
        """The number of the unchanged model's row."""
        return len(self.rows) - 1

    @property
    def probes(self) -> list[int]:
        """The numbers of the rows to be measured, the full one aside."""
        return [int(row) for row in np.unique(self.cells) if row != self.full_row]

    def at_counts(self, counts: Sequence[float]) -> ProbePlan:
        """Return the plan in which only these of the measured counts, and K, are measured."""
        columns = [i for i, k in enumerate(self.measured) if k in counts or k == self.measured[-1]]
        measured = tuple(self.measured[i] for i in columns)
        return ProbePlan(self.rows, self.cells[:, columns], measured)


def default_measured(top_k: int, steps_per_slot: int = 1) -> tuple[float, ...]:
    """Return the counts that are measured by default; the others are interpolated.

    Every step up to half the slots, where the loss bends, then every second slot, then K, at which
    nothing is lost.
    """
    half = max(top_k // 2, 1)
    low = np.arange(steps_per_slot, steps_per_slot * half + 1) / steps_per_slot
    return tuple(sorted({*low.tolist(), *map(float, range(half, top_k, 2)), float(top_k)}))


def default_measured_of_prefill(top_k: int) -> tuple[float, ...]:
    """Return the few counts that tell what a reduced prefix costs, which is next to nothing."""
    return tuple(sorted({1.0, float(min(2, top_k)), float(max(top_k // 2, 1)), float(top_k)}))


def make_plan(
    num_layers: int,
    top_k: int,
    context: Context,
    measured: Sequence[float],
    target: float | None = None,
) -> ProbePlan:
    """Lay out the probes of a context.

    `isolated`: all other layers full. `target`: all others at `target` slots. `paper`: the layers
    before are full and those after keep one, so that they cannot repair the damage (Alloc-MoE,
    arXiv 2604.08133).

    Raises:
        ConfigurationError: a count is outside 1..K, or the target is missing.
    """
    counts = tuple(sorted({*map(float, measured), float(top_k)}))
    if counts[0] < 1 or counts[-1] > top_k:
        raise ConfigurationError(
            f"Kept experts of {counts[0]:g} to {counts[-1]:g} were to be measured; a layer of this "
            f"model keeps 1 to {top_k}."
        )
    others = {"isolated": float(top_k), "paper": 1.0}.get(context, target)
    if others is None or not 1 <= others <= top_k:
        raise ConfigurationError(
            f"Context target needs the mean number of experts that the other layers keep, 1 to "
            f"{top_k}: give --target-quota."
        )
    numbers: dict[tuple[float, ...], int] = {}
    cells = np.zeros((num_layers, len(counts)), np.intp)
    for layer in range(num_layers):
        for column, count in enumerate(counts):
            row = np.full(num_layers, others)
            if context == "paper":
                row[:layer] = top_k
            row[layer] = count
            cells[layer, column] = numbers.setdefault(tuple(row), len(numbers))
    return _full_last(numbers, cells, counts, num_layers, top_k)


def uniform_plan(num_layers: int, top_k: int, rows: Matrix) -> ProbePlan:
    """Lay out given rows, to which the full one is added last; no cell refers to them."""
    full = np.full((1, num_layers), float(top_k))
    return ProbePlan(np.concatenate([rows, full]), np.zeros((0, 0), np.intp), ())


def _full_last(
    numbers: dict[tuple[float, ...], int],
    cells: npt.NDArray[np.intp],
    counts: tuple[float, ...],
    num_layers: int,
    top_k: int,
) -> ProbePlan:
    full = (float(top_k),) * num_layers
    rows = [row for row in numbers if row != full]
    place = {row: number for number, row in enumerate([*rows, full])}
    renumbered = np.array([place[row] for row in numbers], np.intp)
    return ProbePlan(np.array([*rows, full]), renumbered[cells], counts)


def sensitivity_of(plan: ProbePlan, losses: npt.NDArray[np.float64], steps: int = 1) -> Matrix:
    """Return S (L, C): each layer's loss above its own full quota, for k = 1, 1 + 1/steps, .., K.

    `losses` (P,) are the rows' measured losses. In the contexts that reduce other layers too, what
    those cost is in both terms and cancels. A loss that rises with k is noise and is evened out;
    counts between the measured ones are interpolated.
    """
    found = losses[plan.cells]
    found = np.stack([falling_to_zero(row) for row in found - found[:, -1:]])
    top_k = int(plan.measured[-1])
    counts = np.arange(steps, top_k * steps + 1) / steps
    return np.stack([_interpolated(counts, np.array(plan.measured), row) for row in found])


def falling_to_zero(row: Matrix) -> Matrix:
    """Return the non-increasing row nearest to `row` (least squares) whose last value stays.

    Pools neighbours that rise, from left to right, into their mean; none ends below the last.
    """
    blocks: list[tuple[float, int]] = []
    for value in row[:-1]:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] < mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    pooled = np.concatenate([np.full(count, mean) for mean, count in blocks] or [np.zeros(0)])
    return np.append(np.maximum(pooled, row[-1]), row[-1])


def _interpolated(counts: Matrix, measured: Matrix, row: Matrix) -> Matrix:
    """Interpolate geometrically between positive losses, which fall by about a factor per slot."""
    linear = np.interp(counts, measured, row)
    positive = row[:-1] > 0
    if not positive.all() or len(row) < 3:
        return linear
    # The last loss is 0 by definition; the factor of the last measured step goes on to it.
    geometric = np.exp(np.interp(counts, measured[:-1], np.log(row[:-1])))
    between = counts <= measured[-2]
    result: Matrix = np.where(between, geometric, linear)
    return result
