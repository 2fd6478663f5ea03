"""Modes `layer` and `threshold` after SGLang's own routing: one launch from slots to kept slots."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from sglang_alloc_kernels.kept_slots import ScoredSlots, apply_rule_torch
from sglang_alloc_kernels.kept_slots_tile import (
    finish_slots_tile,
    load_slots_tile,
    score_slots_tile,
    store_slots_tile,
)
from sglang_alloc_kernels.kernel_launch import (
    empty_rows,
    kernel_pointers,
    launches_early,
    num_experts_of,
    tokens_per_program,
    warps_of,
)
from sglang_alloc_kernels.layer_quota import layer_quota_torch
from sglang_alloc_kernels.layer_rows import NO_STEP_TENSORS, LayerRows, StepTensors
from sglang_alloc_kernels.score_threshold import score_threshold_torch
from sglang_alloc_kernels.slot_rank import best_slot_tile, slot_rank_tile

Rule = Literal["quota", "threshold", "all"]


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
    a slot must reach (`threshold`; the best slot always stays); `all` keeps every slot. Dropped
    slots get id -1 and weight 0; all others keep id and weight bit for bit where gain is 1 and no
    reference is set. The inputs are left alone.
    """
    limit = rows.limits[layer_index]

    def decide(slots: ScoredSlots) -> torch.Tensor:
        if rule == "all":
            return torch.ones_like(slots.scores, dtype=torch.bool)
        if rule == "quota":
            return layer_quota_torch(slots.scores, limit)
        return score_threshold_torch(slots.scores, limit)

    return apply_rule_torch(
        topk_weights, topk_ids, rows, layer_index, decide, num_shared=num_shared, step=step
    )


def budgeted_slots(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    rows: LayerRows,
    layer_index: int,
    rule: Rule,
    *,
    num_shared: int = 0,
    step: StepTensors = NO_STEP_TENSORS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `budgeted_slots_torch`, in one launch."""
    num_tokens, width = topk_ids.shape
    weights, ids = empty_rows(topk_weights), empty_rows(topk_ids)
    if num_tokens == 0:
        return weights, ids
    block_k = triton.next_power_of_2(width)
    block_tokens = tokens_per_program(num_tokens, block_k)
    early = launches_early(topk_ids.device)
    _budgeted_slots_kernel[(triton.cdiv(num_tokens, block_tokens),)](
        *(topk_weights.contiguous(), topk_ids.contiguous(), weights, ids),
        *kernel_pointers(rows, step),
        *(layer_index, num_tokens),
        NUM_EXPERTS=num_experts_of(rows, step),
        RULE=rule,
        TOP_K=width - num_shared,
        WIDTH=width,
        BLOCK_T=block_tokens,
        BLOCK_K=block_k,
        EARLY=early,
        num_warps=warps_of(block_tokens * block_k**2),
        launch_pdl=early,
    )
    return weights, ids


@triton.jit(do_not_specialize=["layer_index", "num_tokens"])
def _budgeted_slots_kernel(
    weights_ptr,  # (T, WIDTH) routed slots, then the shared experts'
    ids_ptr,  # (T, WIDTH)
    kept_weights_ptr,  # (T, WIDTH) out
    kept_ids_ptr,  # (T, WIDTH) out
    limits_ptr,  # (L,) float32
    gains_ptr,  # (L,) float32 or None
    references_ptr,  # (L,) float32 or None
    saliency_ptr,  # (L, E) float32 or None
    num_valid_ptr,  # (1,) int32 or None
    floors_ptr,  # (T,) int32 or None
    ceilings_ptr,  # (T,) int32 or None
    sums_ptr,  # (L, 4) float32 or None
    lit_ptr,  # (L, E) int8 or None
    layer_index,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    RULE: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per BLOCK_T tokens; launched EARLY, it waits for what comes before it."""
    if EARLY:
        gdc_wait()
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    weights, ids = load_slots_tile(
        weights_ptr, ids_ptr, tokens, num_tokens, num_valid_ptr, WIDTH, BLOCK_K
    )
    scores = score_slots_tile(weights, ids, saliency_ptr, layer_index, NUM_EXPERTS, TOP_K)
    kept = budget_tile(scores, tl.load(limits_ptr + layer_index), RULE)
    weights, ids = finish_slots_tile(
        *(weights, ids, scores, kept, tokens, num_tokens, layer_index),
        *(gains_ptr, references_ptr, floors_ptr, ceilings_ptr, sums_ptr, lit_ptr),
        *(NUM_EXPERTS, TOP_K),
    )
    store_slots_tile(
        kept_weights_ptr, kept_ids_ptr, weights, ids, tokens, num_tokens, WIDTH, BLOCK_K
    )


@triton.jit
def budget_tile(scores, limit, RULE: tl.constexpr):
    """Return the kept mask of a tile by rule `quota`, `threshold` or `all`."""
    if RULE == "quota":
        kept = slot_rank_tile(scores) < limit
    elif RULE == "threshold":
        kept = (scores >= limit) | (scores != scores) | best_slot_tile(scores)
    else:
        kept = tl.full(scores.shape, 1, tl.int1)
    return kept
