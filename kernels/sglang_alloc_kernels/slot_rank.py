"""Rank of every routed slot within its token, the common first step of all modes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def slot_rank_torch(scores: torch.Tensor) -> torch.Tensor:
    """Rank each slot of a token by descending score; ties go to the earlier slot.

    scores: (T, K) float. Returns (T, K) int64 holding a permutation of 0..K-1 per row. A NaN score
    ranks last, so that it can only be kept when everything is. Runs without a host sync.
    """
    comparable = torch.where(torch.isnan(scores), float("-inf"), scores)
    order = comparable.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    columns = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return rank.scatter_(1, order, columns)


@triton.jit
def best_slot_tile(scores):
    """Return which slot of each token (T, K) has rank 0, without ranking the others."""
    comparable = tl.where(scores != scores, float("-inf"), scores)
    slots = tl.arange(0, scores.shape[1])
    return slots[None, :] == tl.argmax(comparable, axis=1, tie_break_left=True)[:, None]


@triton.jit
def slot_rank_tile(scores):
    """Rank each slot of a tile (T, K), as `slot_rank_torch`; K is a power of two."""
    comparable = tl.where(scores != scores, float("-inf"), scores)
    slots = tl.arange(0, scores.shape[1])
    other, mine = comparable[:, None, :], comparable[:, :, None]
    earlier = slots[None, None, :] < slots[None, :, None]
    return tl.sum(((other > mine) | ((other == mine) & earlier)).to(tl.int32), axis=2)
