"""Mode `union` after SGLang's own routing: the tokens of a decode step share one set of experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_alloc_kernels.budgeted_slots import Rule
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
    tokens_per_program,
    warps_of,
)
from sglang_alloc_kernels.largest_keys_tile import largest_keys_tile
from sglang_alloc_kernels.layer_rows import NO_STEP_TENSORS, LayerRows, StepTensors
from sglang_alloc_kernels.score_threshold import score_threshold_torch
from sglang_alloc_kernels.union_selection import (
    SCORE_MAX,
    SCORE_STEPS,
    opened_selection_torch,
)
from sglang_alloc_kernels.union_tiles import opening_slots_tile, union_over_tiles

# One program holds this many pairs of slots at once, 128 tokens of top-8. More tokens have several
# programs, but with a cap: then the one works through them.
PAIRS_AT_ONCE = 8192


def union_slots_torch(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    rows: LayerRows,
    layer_index: int,
    num_experts: int,
    rule: Rule = "quota",
    *,
    num_shared: int = 0,
    step: StepTensors = NO_STEP_TENSORS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one layer's (weights, ids) with the slots dropped whose expert is not in the set.

    Shapes and outcome as in `budgeted_slots_torch`; routed ids are below `num_experts`.
    `rows.limits[layer_index]` is how many of each token's best slots open the set (`quota`) or the
    score from which a slot does (`threshold`; the best slot of a token always does). A token opens
    at least its floor and at most its ceiling; `rows.caps` is as `cap` in
    `opened_selection_torch`. A model that normalises its weights keeps doing so over what was kept
    where `rows.references` is 1.
    """
    limit = rows.limits[layer_index]
    cap = None if rows.caps is None else rows.caps[layer_index]

    def decide(slots: ScoredSlots) -> torch.Tensor:
        opening = _within_bounds(_opening(slots, limit, rule), slots.ranks, step)
        return opened_selection_torch(slots.scores, slots.ids, opening, num_experts, cap=cap)

    return apply_rule_torch(
        topk_weights, topk_ids, rows, layer_index, decide, num_shared=num_shared, step=step
    )


def _opening(slots: ScoredSlots, limit: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Return which slots open the set, (T, K) bool, before each token's own bounds."""
    if rule == "quota":
        return slots.ranks < limit
    return score_threshold_torch(slots.scores, limit)


def _within_bounds(opening: torch.Tensor, ranks: torch.Tensor, step: StepTensors) -> torch.Tensor:
    num_tokens = len(opening)
    if step.floors is not None:
        opening = opening | (ranks < step.floors[:num_tokens, None])
    if step.ceilings is not None:
        opening = opening & (ranks < step.ceilings[:num_tokens, None])
    return opening


def union_slots(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    rows: LayerRows,
    layer_index: int,
    num_experts: int,
    rule: Rule = "quota",
    *,
    num_shared: int = 0,
    step: StepTensors = NO_STEP_TENSORS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `union_slots_torch`: one launch for decode batches, two and a clearing for more tokens."""
    num_tokens, width = topk_ids.shape
    weights, ids = empty_rows(topk_weights), empty_rows(topk_ids)
    if num_tokens == 0:
        return weights, ids
    block_k = triton.next_power_of_2(width)
    block_tokens = tokens_per_program(num_tokens, block_k, PAIRS_AT_ONCE)
    arguments = (
        *(topk_weights.contiguous(), topk_ids.contiguous(), weights, ids),
        *kernel_pointers(rows, step),
    )
    constants = {
        "NUM_EXPERTS": num_experts,
        "RULE": rule,
        "TOP_K": width - num_shared,
        "WIDTH": width,
        "BLOCK_K": block_k,
    }
    if rows.caps is None and num_tokens > block_tokens:
        union_over_tiles((*arguments, layer_index, num_tokens), constants, num_tokens)
        return weights, ids
    mass = rows.caps
    if rows.caps is not None:
        mass = torch.empty(num_experts, dtype=torch.int64, device=topk_ids.device)
    _union_slots_kernel[(1,)](
        *arguments,
        *(rows.caps, mass, layer_index, num_tokens),
        **constants,
        BLOCK_T=block_tokens,
        BLOCK_EXPERTS=triton.next_power_of_2(num_experts),
        num_warps=warps_of(block_tokens * block_k**2),
    )
    return weights, ids


@triton.jit(do_not_specialize=["layer_index", "num_tokens"])
def _union_slots_kernel(
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
    caps_ptr,  # (L,) float32 or None
    mass_ptr,  # (E,) int64 to work in, or None
    layer_index,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    RULE: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """One program: once over the tokens to make the set, once more to keep what is in it."""
    experts = tl.arange(0, BLOCK_EXPERTS)
    needed = tl.zeros([BLOCK_EXPERTS], tl.int32)
    if caps_ptr is not None:
        tl.store(mass_ptr + experts, tl.zeros([BLOCK_EXPERTS], tl.int64), experts < NUM_EXPERTS)
        tl.debug_barrier()
    for start in range(0, num_tokens, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        weights, ids = load_slots_tile(
            weights_ptr, ids_ptr, tokens, num_tokens, num_valid_ptr, WIDTH, BLOCK_K
        )
        scores = score_slots_tile(weights, ids, saliency_ptr, layer_index, NUM_EXPERTS, TOP_K)
        opening = opening_slots_tile(
            *(scores, ids, tokens, num_tokens, limits_ptr, layer_index),
            *(floors_ptr, ceilings_ptr, RULE, TOP_K),
        )
        # One tensor is reshaped, not ids and mask: before a histogram Triton (3.6, 3.9) takes the
        # order of elements to be free, and two of different layouts lose what belongs together.
        opened = tl.reshape(tl.where(opening, ids, -1), [BLOCK_T * BLOCK_K])
        needed += tl.histogram(opened, BLOCK_EXPERTS, mask=opened >= 0)
        if caps_ptr is not None:
            # Ordered, unlike the step's sums: this very launch reads them.
            present = (tl.arange(0, BLOCK_K) < TOP_K)[None, :] & (ids >= 0)
            tl.atomic_add(mass_ptr + ids, score_steps_tile(scores), mask=present)
    in_set = needed > 0
    if caps_ptr is not None:
        tl.debug_barrier()
        room = tl.load(caps_ptr + layer_index).to(tl.int32) - tl.sum(in_set.to(tl.int32))
        # Past the first cache level, which atomics do not update.
        mass = tl.load(mass_ptr + experts, experts < NUM_EXPERTS, 0, cache_modifier=".cg")
        mass = tl.where(in_set | (mass == 0), -1, mass)
        in_set = in_set | largest_keys_tile(mass, room, BITS=56)
    for start in range(0, num_tokens, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        weights, ids = load_slots_tile(
            weights_ptr, ids_ptr, tokens, num_tokens, num_valid_ptr, WIDTH, BLOCK_K
        )
        scores = score_slots_tile(weights, ids, saliency_ptr, layer_index, NUM_EXPERTS, TOP_K)
        routed = (tl.arange(0, BLOCK_K) < TOP_K)[None, :] & (ids >= 0)
        looked_up = tl.reshape(tl.where(routed, ids, 0), [BLOCK_T * BLOCK_K])
        lit = tl.gather(in_set.to(tl.int32), looked_up, 0)
        kept = routed & (tl.reshape(lit, [BLOCK_T, BLOCK_K]) > 0)
        weights, ids = finish_slots_tile(
            *(weights, ids, scores, kept, tokens, num_tokens, layer_index),
            *(gains_ptr, references_ptr, floors_ptr, ceilings_ptr, sums_ptr, lit_ptr),
            *(NUM_EXPERTS, TOP_K),
        )
        store_slots_tile(
            kept_weights_ptr, kept_ids_ptr, weights, ids, tokens, num_tokens, WIDTH, BLOCK_K
        )


@triton.jit
def score_steps_tile(scores):
    """Return scores in fixed point, as `union_selection_torch` sums them; NaN is 0, as is less."""
    positive = tl.where(scores > 0, scores, 0.0)
    return (tl.minimum(positive, SCORE_MAX) * SCORE_STEPS).to(tl.int64)
