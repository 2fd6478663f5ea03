"""Offline story, solving: from sensitivities to the best quotas of every budget, in one pass."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_alloc.errors import TableFormatError
from sglang_alloc.solve_bounds import QuotaBounds, require_bounds


class Solution(NamedTuple):
    """The best quotas of every budget, budgets ascending and ending at the full one."""

    budgets: npt.NDArray[np.int32]  # (N,), consecutive, from the summed smallest quotas to L * K
    quotas: npt.NDArray[np.int16]  # (N, L)
    predicted_loss: npt.NDArray[np.float64]  # (N,), the sensitivities of the row, summed


def solve_all_budgets(
    sensitivity: npt.NDArray[Any], *, min_quota: int = 1, bounds: QuotaBounds | None = None
) -> Solution:
    """Minimise the summed sensitivity under every budget, exactly.

    `sensitivity[l, k - 1]` (L, K) is the quality lost when layer l keeps its top k. The recurrence
    is Alloc-L's (arXiv 2604.08133): D[l, b] = min over k of D[l - 1, b - k] + S[l, k], and a
    budget may be left partly unspent where S is not monotone. O(L * K * N). `bounds` are the
    smallest and the largest quota of each layer; without them every layer has min_quota..K.

    Ties: the row that spends more wins, so that equal predictions never drop an expert; then the
    row whose last layer has the larger quota, then the last but one, and so on. The full budget's
    row is the full model whatever S and the bounds say, because full budget means the unchanged
    model.

    Raises:
        TableFormatError: the sensitivities are not a finite (L, K) matrix, or `min_quota` is not
            within 1..K.
        ConfigurationError: the bounds of a layer leave no quota.
    """
    costs = _checked(sensitivity, min_quota)
    num_layers, top_k = costs.shape
    if bounds is None:
        bounds = QuotaBounds.uniform(num_layers, min_quota, top_k)
    require_bounds(bounds, num_layers, top_k)
    exact_loss, choices = _forward(costs, bounds)
    extra = _best_spend(exact_loss)
    quotas = _backtrack(choices, extra) + bounds.lower
    quotas[-1] = top_k
    loss = costs[np.arange(num_layers), quotas - 1].sum(axis=1)
    first = int(bounds.lower.sum())
    budgets = np.arange(first, first + extra.size, dtype=np.int32)
    return Solution(budgets, quotas.astype(np.int16), loss)


def _checked(sensitivity: npt.NDArray[Any], min_quota: int) -> npt.NDArray[np.float64]:
    costs = np.asarray(sensitivity, dtype=np.float64)
    if costs.ndim != 2 or costs.size == 0:
        raise TableFormatError(
            f"sensitivity: expected a matrix of (MoE layers, top-k), found shape {costs.shape}."
        )
    bad = np.argwhere(~np.isfinite(costs))
    if bad.size:
        layer, column = bad[0]
        raise TableFormatError(
            f"sensitivity: expected finite losses, found {costs[layer, column]} for row {layer}, "
            f"top-{column + 1}. Profile that layer again."
        )
    if not 1 <= min_quota <= costs.shape[1]:
        raise TableFormatError(
            f"min_quota: expected 1 to the model's top-k ({costs.shape[1]}), found {min_quota}."
        )
    return costs


def _forward(
    costs: npt.NDArray[np.float64], bounds: QuotaBounds
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the least loss (M,) of spending exactly e extra, and each layer's choice (L, M).

    `extra` counts activations above the layers' smallest quotas; M runs up to the full budget, and
    what the largest quotas put out of reach costs infinity.
    """
    num_layers, top_k = costs.shape
    reach = num_layers * top_k - int(bounds.lower.sum()) + 1
    loss = np.full(reach, np.inf)
    loss[0] = 0.0
    choices = np.zeros((num_layers, reach), dtype=np.intp)
    for layer, (low, high) in enumerate(zip(bounds.lower, bounds.upper, strict=True)):
        num_choices = int(high - low) + 1
        candidates = np.full((num_choices, reach), np.inf)
        for choice in range(num_choices):
            candidates[choice, choice:] = loss[: reach - choice] + costs[layer, low + choice - 1]
        # argmin takes the first of equals: look at the large quotas first.
        choices[layer] = num_choices - 1 - candidates[::-1].argmin(axis=0)
        loss = candidates.min(axis=0)
    return loss, choices


def _best_spend(exact_loss: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Return (M,) the extra spend of least loss within every budget, the larger one on ties."""
    positions = np.arange(exact_loss.size)
    at_minimum = exact_loss == np.minimum.accumulate(exact_loss)
    return np.maximum.accumulate(np.where(at_minimum, positions, 0)).astype(np.intp)


def _backtrack(choices: npt.NDArray[Any], extra: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Return the quota above the minimum of every budget and layer, (M, L)."""
    num_layers = choices.shape[0]
    left = extra.copy()
    quotas = np.zeros((left.size, num_layers), dtype=np.intp)
    for layer in range(num_layers - 1, -1, -1):
        quotas[:, layer] = choices[layer, left]
        left -= quotas[:, layer]
    return quotas
