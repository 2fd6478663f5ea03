"""Mode `union` for more tokens than one program holds at once: the set is made by several programs.

A launch marks the experts that slots open, the next one keeps the slots whose expert is marked: the
launches are the barrier. All programs write the same mark, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_alloc_kernels.budgeted_slots import budget_tile
from sglang_alloc_kernels.kept_slots_tile import (
    finish_slots_tile,
    load_bound_tile,
    load_slots_tile,
    score_slots_tile,
    store_slots_tile,
)
from sglang_alloc_kernels.kernel_launch import tokens_per_program, warps_of
from sglang_alloc_kernels.slot_rank import slot_rank_tile


def union_over_tiles(
    arguments: tuple[Any, ...], constants: Mapping[str, Any], num_tokens: int
) -> None:
    """Do what the kernel of `union_slots` does, without a cap, for any number of tokens.

    arguments: the kernel's, without caps and mass; constants: its own. Two launches after one that
    clears the marks; no host sync.
    """
    block_k = constants["BLOCK_K"]
    block_tokens = tokens_per_program(num_tokens, block_k)
    grid = (triton.cdiv(num_tokens, block_tokens),)
    marks = torch.zeros(constants["NUM_EXPERTS"], dtype=torch.int32, device=arguments[0].device)
    named = {**constants, "BLOCK_T": block_tokens, "num_warps": warps_of(block_tokens * block_k**2)}
    _union_slots_open_kernel[grid](*arguments, marks, **named)
    named.pop("RULE")
    _union_slots_keep_kernel[grid](*arguments, marks, **named)


@triton.jit
def opening_slots_tile(
    scores,
    ids,
    tokens,
    num_tokens,
    limits_ptr,
    layer_index,
    floors_ptr,
    ceilings_ptr,
    RULE: tl.constexpr,
    TOP_K,
):
    """Return which slots (T, K) open the set, each token's own bounds applied."""
    present = (tl.arange(0, ids.shape[1]) < TOP_K)[None, :] & (ids >= 0)
    opening = present & budget_tile(scores, tl.load(limits_ptr + layer_index), RULE)
    if (floors_ptr is not None) or (ceilings_ptr is not None):
        ranks = slot_rank_tile(scores)
        if floors_ptr is not None:
            floors = load_bound_tile(floors_ptr, tokens, num_tokens)
            opening = opening | (present & (ranks < floors))
        if ceilings_ptr is not None:
            opening = opening & (ranks < load_bound_tile(ceilings_ptr, tokens, num_tokens))
    return opening


@triton.jit(do_not_specialize=["layer_index", "num_tokens"])
def _union_slots_open_kernel(
    weights_ptr,  # (T, WIDTH)
    ids_ptr,  # (T, WIDTH)
    kept_weights_ptr,
    kept_ids_ptr,
    limits_ptr,  # (L,) float32
    gains_ptr,
    references_ptr,
    saliency_ptr,  # (L, E) float32 or None
    num_valid_ptr,  # (1,) int32 or None
    floors_ptr,  # (T,) int32 or None
    ceilings_ptr,  # (T,) int32 or None
    sums_ptr,
    lit_ptr,
    layer_index,
    num_tokens,
    marks_ptr,  # (E,) int32, cleared
    NUM_EXPERTS: tl.constexpr,
    RULE: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mark the experts that the slots of BLOCK_T tokens open."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    weights, ids = load_slots_tile(
        weights_ptr, ids_ptr, tokens, num_tokens, num_valid_ptr, WIDTH, BLOCK_K
    )
    scores = score_slots_tile(weights, ids, saliency_ptr, layer_index, NUM_EXPERTS, TOP_K)
    opening = opening_slots_tile(
        *(scores, ids, tokens, num_tokens, limits_ptr, layer_index),
        *(floors_ptr, ceilings_ptr, RULE, TOP_K),
    )
    tl.store(marks_ptr + ids, tl.full(ids.shape, 1, tl.int32), mask=opening)


@triton.jit(do_not_specialize=["layer_index", "num_tokens"])
def _union_slots_keep_kernel(
    weights_ptr,  # (T, WIDTH)
    ids_ptr,  # (T, WIDTH)
    kept_weights_ptr,  # (T, WIDTH) out
    kept_ids_ptr,  # (T, WIDTH) out
    limits_ptr,
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
    marks_ptr,  # (E,) int32
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Keep the slots of BLOCK_T tokens whose expert is marked."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    weights, ids = load_slots_tile(
        weights_ptr, ids_ptr, tokens, num_tokens, num_valid_ptr, WIDTH, BLOCK_K
    )
    scores = score_slots_tile(weights, ids, saliency_ptr, layer_index, NUM_EXPERTS, TOP_K)
    routed = (tl.arange(0, BLOCK_K) < TOP_K)[None, :] & (ids >= 0)
    kept = routed & (tl.load(marks_ptr + ids, mask=routed, other=0) > 0)
    weights, ids = finish_slots_tile(
        *(weights, ids, scores, kept, tokens, num_tokens, layer_index),
        *(gains_ptr, references_ptr, floors_ptr, ceilings_ptr, sums_ptr, lit_ptr),
        *(NUM_EXPERTS, TOP_K),
    )
    store_slots_tile(
        kept_weights_ptr, kept_ids_ptr, weights, ids, tokens, num_tokens, WIDTH, BLOCK_K
    )
