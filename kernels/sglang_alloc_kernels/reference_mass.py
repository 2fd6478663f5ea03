"""Reference renormalisation: kept weights are normalised by more slots than were kept.

Normalising by the kept slots alone overdoes it where many small slots were dropped, and not
normalising leaves the output too small (arXiv 2609.04575).
"""

from __future__ import annotations

import torch

from sglang_alloc_kernels.slot_rank import slot_rank_torch


def reference_factor_torch(
    weights: torch.Tensor,
    kept: torch.Tensor,
    scores: torch.Tensor,
    reference: int | torch.Tensor,
) -> torch.Tensor:
    """Return what each token's kept weights are multiplied by, (T, 1).

    weights: (T, K) float, of all slots, 0 where absent; kept: (T, K) bool; scores: (T, K) float,
    by which slots are ranked; reference: how many best slots count, a number or a tensor of one
    element on the device. The kept slots always count too, so 1 normalises over what was kept, and
    K or more changes nothing. A NaN weighs nothing here, so it stays the matter of its own slot.
    Runs without a host sync.
    """
    counted = (slot_rank_torch(scores) < reference) | kept
    numbers = weights.nan_to_num(nan=0.0, posinf=torch.inf)
    mass = (numbers * counted).sum(dim=1, keepdim=True)
    return torch.where(mass > 0, numbers.sum(dim=1, keepdim=True) / mass, 1.0)
