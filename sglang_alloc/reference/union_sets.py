"""Offline story, calibrating for mode `union`: references, and the loss of every budget.

Decode runs the tokens of several requests at once. Here the windows of a batch stand for requests,
and their tokens at one position for a step.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.calibrate_corrections import references_of_rows
from sglang_alloc.calibrate_thresholds import anchor_rows
from sglang_alloc.reference.allocations import referenced, scores
from sglang_alloc.reference.model import Allocation, ReferenceModel
from sglang_alloc.reference.sensitivity import loss_from_layer
from sglang_alloc_kernels.score_threshold import score_threshold_torch

REFERENCE_ANCHORS = 9


class UnionRows(NamedTuple):
    """Of every budget (N,): k2, and the loss above full on the calibration text."""

    references: list[int]
    losses: NDArray[np.float64]


def union_allocation(
    thresholds: Sequence[float], saliency: Tensor, batch: int, steps: int
) -> Allocation:
    """Mode `union` over batches of `batch` windows of `steps` tokens each.

    Per step and layer, the slots whose weight times saliency (L, E) reaches thresholds[layer], and
    each token's best one, open the set of experts; other slots stay where their expert is in the
    set. The windows' number must be a multiple of `batch`.
    """
    num_experts = saliency.shape[1]

    def allocate(layer: int, _x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        opening = score_threshold_torch(scores(layer, ids, weights, saliency), thresholds[layer])
        # (T, K) is (groups * batch * steps, K): bring the tokens of one step together.
        by_step, opening = (
            slots.view(-1, batch, steps, ids.shape[1]).transpose(1, 2) for slots in (ids, opening)
        )
        opened = torch.where(opening, by_step, num_experts).flatten(2)
        in_set = torch.zeros(*opened.shape[:2], num_experts + 1, dtype=torch.bool)
        in_set.scatter_(2, opened, True)
        in_set[..., num_experts] = False
        kept = in_set.gather(2, by_step.flatten(2)).view(by_step.shape).transpose(1, 2)
        return weights.masked_fill(~kept.reshape(weights.shape), 0.0)

    return allocate


def served_union(
    tables: BudgetTables, budget: int, saliency: Tensor, batch: int, steps: int
) -> Allocation:
    """Mode `union` with the thresholds and references of the tables, as it is served."""
    row = budget - tables.budget_min
    assert tables.union_thresholds is not None
    rule = union_allocation(tables.union_thresholds[row].tolist(), saliency, batch, steps)
    if tables.union_references is None:
        return rule
    return referenced(rule, tables.union_references[row].tolist(), saliency)


@torch.no_grad()
def calibrate_union(
    model: ReferenceModel,
    windows: Tensor,
    saliency: Tensor,
    thresholds: NDArray[np.float32],
    *,
    batch: int,
    executor: Executor,
) -> UnionRows:
    """Find the references of every row of thresholds (N, L), and measure its loss.

    windows (B, S + 1), B a multiple of `batch`, the requests of a decode step; larger steps share
    more experts and lose less. A k2 is found with all layers reduced, at some budgets, and holds
    for all layers. The last row is the full model.
    """
    layers, top_k = model.config.num_layers, model.config.top_k
    x, steps = model.embed_tokens(windows[:, :-1]), windows.shape[1] - 1

    def loss_at(place: tuple[int, int]) -> float:
        row, reference = place
        rule = union_allocation(thresholds[row].tolist(), saliency, batch, steps)
        rule = referenced(rule, [reference] * layers, saliency)
        return loss_from_layer(model, 0, x, windows, rule)

    anchors = anchor_rows(len(thresholds), REFERENCE_ANCHORS)
    candidates = list(range(top_k // 2, top_k + 1))
    places = [(row, k2) for row in anchors[:-1] for k2 in candidates]
    found = np.array(list(executor.map(loss_at, places))).reshape(-1, len(candidates))
    best = [candidates[place] for place in found.argmin(axis=1)]
    references = references_of_rows(len(thresholds), anchors, [*best, top_k], top_k)
    measured = np.array(list(executor.map(loss_at, enumerate(references))))
    return UnionRows(references, measured - measured[-1])
