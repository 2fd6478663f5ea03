"""Modes `layer` and `threshold` after SGLang's own routing: one launch from slots to kept slots."""

from __future__ import annotations

from typing import Literal

import torch

from sglang_alloc_kernels.kept_slots import ScoredSlots, apply_rule_torch
from sglang_alloc_kernels.layer_quota import layer_quota_torch
from sglang_alloc_kernels.layer_rows import NO_STEP_TENSORS, LayerRows, StepTensors
from sglang_alloc_kernels.score_threshold import score_threshold_torch

Rule = Literal["quota", "threshold"]


def budgeted_slots_torch(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    rows: LayerRows,
    layer_index: int,
    rule: Rule,
    *,
    num_shared: int = 0,
    step: StepTensors = NO_STEP_TENSORS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one layer's (weights, ids) with the slots beyond its quota or threshold dropped.

    topk_weights: (T, K + num_shared) float; topk_ids: the same shape, int, -1 where absent; the
    trailing columns belong to shared experts and are never dropped. `rows.limits[layer_index]` is
    the number of slots that each token keeps (`quota`; a fraction is rounded up) or the score that
    a slot must reach (`threshold`; the best slot always stays). Dropped slots get id -1 and weight
    0; all others keep id and weight bit for bit where gain is 1 and no reference is set. The inputs
    are left alone.
    """
    limit = rows.limits[layer_index]

    def decide(slots: ScoredSlots) -> torch.Tensor:
        if rule == "quota":
            return layer_quota_torch(slots.scores, limit)
        return score_threshold_torch(slots.scores, limit)

    return apply_rule_torch(
        topk_weights, topk_ids, rows, layer_index, decide, num_shared=num_shared, step=step
    )
