"""The last step of every mode: mark the slots that were not kept."""

from __future__ import annotations

import torch

DROPPED = -1  # SGLang's own mark for padded rows and experts of other ranks


def drop_slots_torch(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weights, ids) with weight 0 and id -1 in every slot that is not kept.

    topk_weights: (T, K) float; topk_ids: (T, K) int; kept: (T, K) bool. The inputs are left alone:
    SGLang's recorders may still hold them.
    """
    return topk_weights.masked_fill(~kept, 0.0), topk_ids.masked_fill(~kept, DROPPED)
