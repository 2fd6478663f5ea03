"""Mode `threshold`: a slot stays when its score passes the layer's calibrated threshold.

The decision of a token depends on that token alone, so no request can change another's output.
"""

from __future__ import annotations

import torch

from sglang_alloc_kernels.slot_rank import slot_rank_torch


def score_threshold_torch(scores: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """Return the kept mask of the slots at or above the threshold, and of each token's best one.

    scores: (T, K) float, weight times expert saliency where the table has saliency; threshold: a
    number or a tensor of one element on the device of `scores`. A NaN is below nothing, so it is
    kept: only the router may decide what to make of it. Returns (T, K) bool.
    """
    return ~(scores < threshold) | (slot_rank_torch(scores) == 0)
