"""Mode `union` after SGLang's own routing: the tokens of a decode step share one set of experts."""

from __future__ import annotations

import torch

from sglang_alloc_kernels.kept_slots import ScoredSlots, apply_rule_torch
from sglang_alloc_kernels.layer_rows import NO_STEP_TENSORS, LayerRows, StepTensors
from sglang_alloc_kernels.union_selection import union_selection_torch


def union_slots_torch(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    rows: LayerRows,
    layer_index: int,
    num_experts: int,
    *,
    num_shared: int = 0,
    step: StepTensors = NO_STEP_TENSORS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one layer's (weights, ids) with the slots dropped whose expert is not in the set.

    Shapes and outcome as in `budgeted_slots_torch`; routed ids are below `num_experts`.
    `rows.limits[layer_index]` is how many of each token's best slots open the set, at least its
    floor and at most its ceiling; `rows.caps` is as `cap` in `union_selection_torch`. A model that
    normalises its weights keeps doing so over what was kept where `rows.references` is 1.
    """
    opening = _opening_slots(rows.limits[layer_index], len(topk_ids), step)
    cap = None if rows.caps is None else rows.caps[layer_index]

    def decide(slots: ScoredSlots) -> torch.Tensor:
        return union_selection_torch(slots.scores, slots.ids, opening, num_experts, cap=cap)

    return apply_rule_torch(
        topk_weights, topk_ids, rows, layer_index, decide, num_shared=num_shared, step=step
    )


def _opening_slots(limit: torch.Tensor, num_tokens: int, step: StepTensors) -> torch.Tensor:
    """Return how many best slots of each token open the set, (T, 1) float32."""
    opening = limit.expand(num_tokens, 1)
    if step.floors is not None:
        opening = torch.maximum(opening, step.floors[:num_tokens, None].float())
    if step.ceilings is not None:
        opening = torch.minimum(opening, step.ceilings[:num_tokens, None].float())
    return opening
