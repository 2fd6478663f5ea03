"""Mode `layer`: every token keeps its best K_l slots (Alloc-MoE, arXiv 2604.08133, Alloc-L)."""

from __future__ import annotations

import torch

from sglang_alloc_kernels.slot_rank import slot_rank_torch


def layer_quota_torch(scores: torch.Tensor, quota: int | torch.Tensor) -> torch.Tensor:
    """Return the kept mask of the best `quota` slots of each token.

    scores: (T, K) float; quota: an integer, or an integer tensor of one element on the device of
    `scores` (read there, without a host sync). Returns (T, K) bool.
    """
    return slot_rank_torch(scores) < quota
