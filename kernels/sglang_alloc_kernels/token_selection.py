"""Mode `token`: the tokens of a forward compete for the slots above a base
(Alloc-MoE, arXiv 2604.08133, Alloc-T)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_alloc_kernels.kept_slots_tile import load_bound_tile
from sglang_alloc_kernels.largest_keys_tile import sortable_bits_tile
from sglang_alloc_kernels.slot_rank import slot_rank_tile, slot_rank_torch

# The paper finds one guaranteed slot per token to be best.
BASE_SLOTS = 1
NOT_A_CANDIDATE = -(1 << 31)  # below the key of every score


def token_selection_torch(
    scores: torch.Tensor, quota: float | torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Keep exactly `quota * valid tokens` slots: each token's best one, then the best of the rest.

    scores: (T, K) float; quota: 1 to K, a number or a tensor of one element on the device of
    `scores`; where `quota * valid tokens` is a fraction, it is rounded down. valid: (T,) bool,
    False for padding rows, which keep nothing and count for nothing. Ties go to the earlier token,
    then the earlier slot, so every rank of a tensor-parallel group decides alike; a NaN is the last
    choice. Returns (T, K) bool; runs without a host sync.
    """
    rank = slot_rank_torch(scores)
    rows = torch.ones_like(rank[:, 0], dtype=torch.bool) if valid is None else valid
    contenders = (rank >= BASE_SLOTS) & rows[:, None]
    keys = torch.where(contenders, sortable_bits_torch(scores), NOT_A_CANDIDATE).flatten()
    order = keys.argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(0, order, torch.arange(len(order), device=order.device))
    best = (place < extra_slots_torch(quota, rows.sum())).view_as(contenders)
    return ((rank < BASE_SLOTS) & rows[:, None]) | (best & contenders)


def extra_slots_torch(quota: float | torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """Return how many slots above the base `num_tokens` tokens share, rounded down in float32."""
    above = torch.as_tensor(quota, dtype=torch.float32, device=num_tokens.device) - BASE_SLOTS
    return (above * num_tokens.float()).floor()


def capped_slots_torch(
    ranks: torch.Tensor, quota: torch.Tensor, capped: torch.Tensor
) -> torch.Tensor:
    """Return which slots (T, K) bool tokens with a ceiling keep before it is applied.

    Each keeps its best slots up to the quota, rounded down, without a contest: what a ceiling takes
    from its token must not be won by others, nor lost by them.

    ranks: (T, K) int; quota: a number; capped: (T,) bool, which tokens have a ceiling below K.
    """
    return capped[:, None] & (ranks < quota.floor())


def sortable_bits_torch(scores: torch.Tensor) -> torch.Tensor:
    """Return int32 keys in the order of the scores; NaN sorts like -inf, and -0 like 0."""
    numbers = scores.float()
    numbers = torch.where(numbers == 0, 0.0, numbers)
    numbers = torch.where(torch.isnan(numbers), float("-inf"), numbers)
    bits = numbers.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def contending_keys_tile(scores, best, ids, tokens, num_tokens, floors_ptr, ceilings_ptr, TOP_K):
    """Return the keys (T, K) of slots in the contest, -1 elsewhere, and which tokens take part.

    Protected tokens, tokens with a ceiling and padding do not; a token's best slot, `best` (T, K),
    needs no contest.
    """
    routed = (tl.arange(0, ids.shape[1]) < TOP_K)[None, :]
    contending = tl.max((routed & (ids >= 0)).to(tl.int32), axis=1) > 0
    if floors_ptr is not None:
        floors = tl.load(floors_ptr + tokens, mask=tokens < num_tokens, other=0)
        contending = contending & (floors < TOP_K)
    if ceilings_ptr is not None:
        ceilings = tl.load(ceilings_ptr + tokens, mask=tokens < num_tokens, other=0)
        contending = contending & (ceilings >= TOP_K)
    candidate = contending[:, None] & routed & ~best
    return tl.where(candidate, sortable_bits_tile(scores), -1), contending


@triton.jit
def capped_slots_tile(scores, tokens, num_tokens, limits_ptr, layer_index, ceilings_ptr, TOP_K):
    """Return which slots (T, K) tokens with a ceiling keep before it, as `capped_slots_torch`."""
    capped = load_bound_tile(ceilings_ptr, tokens, num_tokens) < TOP_K
    return capped & (slot_rank_tile(scores) < tl.floor(tl.load(limits_ptr + layer_index)))


@triton.jit
def extra_slots_tile(limits_ptr, layer_index, num_contending):
    """Return how many slots above the base the contest is about, as `extra_slots_torch`."""
    above = tl.load(limits_ptr + layer_index) - 1
    return tl.floor(above * num_contending.to(tl.float32)).to(tl.int32)
