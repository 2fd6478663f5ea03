"""Mode `token` after SGLang's own routing: the tokens of a forward compete for a layer's slots."""

from __future__ import annotations

import torch

from sglang_alloc_kernels.kept_slots import ScoredSlots, apply_rule_torch
from sglang_alloc_kernels.layer_rows import NO_STEP_TENSORS, LayerRows, StepTensors
from sglang_alloc_kernels.token_selection import token_selection_torch


def token_slots_torch(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    rows: LayerRows,
    layer_index: int,
    *,
    num_shared: int = 0,
    step: StepTensors = NO_STEP_TENSORS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one layer's (weights, ids) with the slots dropped that lost against other tokens'.

    Shapes and outcome as in `budgeted_slots_torch`. `rows.limits[layer_index]` is the mean number
    of slots per token, 1 to K, fractions included. Protected tokens keep everything, take no part
    in the contest and leave the others exactly their own budget; floors and ceilings of the other
    tokens are applied after it.
    """

    def decide(slots: ScoredSlots) -> torch.Tensor:
        contending = (slots.ids >= 0).any(dim=1) & ~slots.protected(step)[:, 0]
        return token_selection_torch(slots.scores, rows.limits[layer_index], contending)

    return apply_rule_torch(
        topk_weights, topk_ids, rows, layer_index, decide, num_shared=num_shared, step=step
    )
