"""Offline story, calibrating: which corrections of the kept weights lower the loss.

A reference k2 normalises kept weights by the mass of the best k2 slots (arXiv 2609.04575); a gain
is a factor on a layer's output. Both are found with every layer reduced, at anchors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def search_reference(top_k: int, losses_of: Callable[[int], Matrix]) -> int:
    """Return the k2 of least loss, K where none is surely better than changing nothing.

    `losses_of(k2)` measures the loss of each window, (W,). The loss is taken to fall to its least
    and then to rise as k2 goes down from K, so the search ends at the first rise, or at half of K.
    A k2 counts as better when it is so by more than the standard error over the windows.
    """
    unchanged = best_losses = losses_of(top_k)
    best = top_k
    for k2 in range(top_k - 1, max(top_k // 2, 1) - 1, -1):
        losses = losses_of(k2)
        if losses.mean() >= best_losses.mean():
            break
        best, best_losses = k2, losses
    return best if is_surely_lower(best_losses, unchanged) else top_k


def is_surely_lower(losses: Matrix, others: Matrix) -> bool:
    """Tell whether windows lose less than the same windows otherwise, by more than the error."""
    differences = losses - others
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return bool(differences.mean() < -error)


def references_of_rows(
    num_budgets: int, anchors: Sequence[int], chosen: Sequence[int], top_k: int
) -> list[int]:
    """Return each row's k2, (N,): the nearest anchor's, and K for the full budget."""
    places = np.array(anchors)
    nearest = [int(np.abs(places - row).argmin()) for row in range(num_budgets)]
    return [*(chosen[place] for place in nearest[:-1]), top_k]


def gains_of_rows(quotas: Matrix, anchors: Sequence[int], gains: Matrix) -> Matrix:
    """Return the gains (N, L) of every row, from those of the anchors (A, L).

    Between two anchors a layer's gain goes with its quota, because that is what it makes up for; it
    goes with the budget where both anchors have the same quota. The full budget's gains are 1.
    """
    rows = np.arange(len(quotas))
    after = np.clip(np.searchsorted(anchors, rows), 1, len(anchors) - 1)
    low, high = np.array(anchors)[after - 1], np.array(anchors)[after]
    by_budget = np.broadcast_to(((rows - low) / (high - low))[:, None], quotas.shape)
    span = quotas[high] - quotas[low]
    by_quota = np.divide(quotas - quotas[low], span, out=by_budget.copy(), where=span != 0)
    share = np.clip(by_quota, 0.0, 1.0)
    found: Matrix = gains[after - 1] + share * (gains[after] - gains[after - 1])
    found[-1] = 1.0
    return found
