"""Mode `token` after SGLang's own routing: the tokens of a forward compete for a layer's slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_alloc_kernels.kept_slots import ScoredSlots, apply_rule_torch
from sglang_alloc_kernels.kept_slots_tile import (
    finish_slots_tile,
    load_slots_tile,
    score_slots_tile,
    store_slots_tile,
)
from sglang_alloc_kernels.kernel_launch import empty_rows, kernel_pointers, num_experts_of
from sglang_alloc_kernels.largest_keys_tile import largest_keys_tile
from sglang_alloc_kernels.layer_rows import NO_STEP_TENSORS, LayerRows, StepTensors
from sglang_alloc_kernels.slot_rank import best_slot_tile
from sglang_alloc_kernels.token_contest import token_contest
from sglang_alloc_kernels.token_selection import (
    capped_slots_tile,
    capped_slots_torch,
    contending_keys_tile,
    extra_slots_tile,
    token_selection_torch,
)

# Slots that one program of 16 warps selects from: 512 tokens of top-8, 8 slots a thread.
ONE_PROGRAM_SLOTS = 4096


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
    of slots per token, 1 to K, fractions included. Protected tokens keep everything; those with a
    ceiling below K keep their best slots up to it, and up to the quota rounded down. Both take no
    part in the contest and leave the others exactly their own budget; floors of the others are
    applied after it.
    """

    def decide(slots: ScoredSlots) -> torch.Tensor:
        capped, quota = slots.capped(step)[:, 0], rows.limits[layer_index]
        contending = (slots.ids >= 0).any(dim=1) & ~slots.protected(step)[:, 0] & ~capped
        won = token_selection_torch(slots.scores, quota, contending)
        return won | capped_slots_torch(slots.ranks, quota, capped)

    return apply_rule_torch(
        topk_weights, topk_ids, rows, layer_index, decide, num_shared=num_shared, step=step
    )


def token_slots(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    rows: LayerRows,
    layer_index: int,
    *,
    num_shared: int = 0,
    step: StepTensors = NO_STEP_TENSORS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_slots_torch`: one launch for decode batches, six and a clearing for more tokens."""
    num_tokens, width = topk_ids.shape
    weights, ids = empty_rows(topk_weights), empty_rows(topk_ids)
    if num_tokens == 0:
        return weights, ids
    block_tokens, block_k = triton.next_power_of_2(num_tokens), triton.next_power_of_2(width)
    arguments = (
        *(topk_weights.contiguous(), topk_ids.contiguous(), weights, ids),
        *kernel_pointers(rows, step),
        *(layer_index, num_tokens),
    )
    constants = {
        "NUM_EXPERTS": num_experts_of(rows, step),
        "TOP_K": width - num_shared,
        "WIDTH": width,
        "BLOCK_K": block_k,
    }
    slots = block_tokens * block_k
    if slots > ONE_PROGRAM_SLOTS:
        token_contest(arguments, constants, num_tokens)
    else:
        _token_slots_kernel[(1,)](
            *arguments, **constants, BLOCK_T=block_tokens, num_warps=token_warps(slots)
        )
    return weights, ids


def token_warps(slots: int) -> int:
    """Return the warps of the program that holds so many slots.

    The first two were the fastest on an H200; the last was not compared with others.
    """
    return 2 if slots <= 128 else 4 if slots <= 1024 else 16


@triton.jit(do_not_specialize=["layer_index", "num_tokens"])
def _token_slots_kernel(
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
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program holds all tokens."""
    tokens = tl.arange(0, BLOCK_T)
    weights, ids = load_slots_tile(
        weights_ptr, ids_ptr, tokens, num_tokens, num_valid_ptr, WIDTH, BLOCK_K
    )
    scores = score_slots_tile(weights, ids, saliency_ptr, layer_index, NUM_EXPERTS, TOP_K)
    best = best_slot_tile(scores)
    keys, contending = contending_keys_tile(
        scores, best, ids, tokens, num_tokens, floors_ptr, ceilings_ptr, TOP_K
    )
    wanted = extra_slots_tile(limits_ptr, layer_index, tl.sum(contending.to(tl.int32)))
    won = largest_keys_tile(tl.reshape(keys, [BLOCK_T * BLOCK_K]), wanted, BITS=32)
    kept = tl.reshape(won, [BLOCK_T, BLOCK_K]) | (contending[:, None] & best)
    if ceilings_ptr is not None:
        kept = kept | capped_slots_tile(
            scores, tokens, num_tokens, limits_ptr, layer_index, ceilings_ptr, TOP_K
        )
    weights, ids = finish_slots_tile(
        *(weights, ids, scores, kept, tokens, num_tokens, layer_index),
        *(gains_ptr, references_ptr, floors_ptr, ceilings_ptr, sums_ptr, lit_ptr),
        *(NUM_EXPERTS, TOP_K),
    )
    store_slots_tile(
        kept_weights_ptr, kept_ids_ptr, weights, ids, tokens, num_tokens, WIDTH, BLOCK_K
    )
