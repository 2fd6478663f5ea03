"""Offline story, calibrating: the score thresholds of every budget, from how scores are spread.

Some budgets are anchors: the engine runs the calibration text with every layer reduced to its
quota there, and records the scores that each layer then sees. The budgets between two anchors take
thresholds between theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_alloc.score_histogram import kept_on_average, threshold_of_quota
from sglang_alloc.sensitivity_file import HALF_SLOTS
from sglang_alloc.solve import solve_all_budgets
from sglang_alloc.solve_bounds import QuotaBounds

Matrix = npt.NDArray[np.float64]


class MeanQuotas(NamedTuple):
    """Mean kept slots of each layer for every budget, and the loss that they are predicted."""

    quotas: Matrix  # (N, L), in half slots
    predicted_loss: Matrix  # (N,)


class Scores(NamedTuple):
    """What one anchor recorded: slots that are not their token's best by bin, and tokens."""

    counts: npt.NDArray[np.int64]  # (L, NUM_BINS)
    tokens: npt.NDArray[np.int64]  # (L,)


def solve_mean_quotas(threshold_sensitivity: Matrix, bounds: QuotaBounds) -> MeanQuotas:
    """Solve in half slots, which thresholds can keep on average; (L, 2K - 1) to every budget."""
    halves = QuotaBounds(
        HALF_SLOTS * bounds.lower - (HALF_SLOTS - 1), HALF_SLOTS * bounds.upper - (HALF_SLOTS - 1)
    )
    solution = solve_all_budgets(threshold_sensitivity, bounds=halves)
    # Choice c stands for (c + 1) / 2 slots, and two choices for one activation of the budget.
    quotas = (solution.quotas[::HALF_SLOTS] + (HALF_SLOTS - 1)) / HALF_SLOTS
    return MeanQuotas(quotas, solution.predicted_loss[::HALF_SLOTS])


def anchor_rows(num_budgets: int, count: int) -> list[int]:
    """Return evenly spaced rows of the table, the smallest and the full budget among them."""
    return sorted({int(row) for row in np.linspace(0, num_budgets - 1, count).round()})


def thresholds_of(mean: MeanQuotas, anchors: Sequence[int], scores: Sequence[Scores]) -> Matrix:
    """Return the thresholds (N, L); the full budget's are 0, which keeps everything."""
    num_budgets, num_layers = mean.quotas.shape
    rows = np.arange(num_budgets)
    after = np.clip(np.searchsorted(anchors, rows), 1, len(anchors) - 1)
    found = np.zeros((num_budgets, num_layers))
    for row in rows[:-1]:
        low, high = after[row] - 1, after[row]
        share = (row - anchors[low]) / (anchors[high] - anchors[low])
        for layer in range(num_layers):
            quota = float(mean.quotas[row, layer])
            at = [_threshold(scores[anchor], layer, quota) for anchor in (low, high)]
            found[row, layer] = at[0] + share * (at[1] - at[0]) if at[0] != at[1] else at[0]
    return found


def heldout_errors(
    thresholds: Matrix, mean: MeanQuotas, anchors: Sequence[int], heldout: Sequence[Scores]
) -> list[float]:
    """Return (kept - wanted) / wanted activations per token at each anchor, on other text."""
    errors = []
    for row, scores in zip(anchors, heldout, strict=True):
        wanted = float(mean.quotas[row].sum())
        kept = sum(
            kept_on_average(counts, int(tokens), float(threshold))
            for counts, tokens, threshold in zip(*scores, thresholds[row], strict=True)
        )
        errors.append((kept - wanted) / wanted)
    return errors


def _threshold(scores: Scores, layer: int, quota: float) -> float:
    return threshold_of_quota(scores.counts[layer], int(scores.tokens[layer]), quota)
