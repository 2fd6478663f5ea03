"""What routing did in a step, counted on the device beside the routing itself.

The routing kernels add to `StepSums`. Once a step, `step_statistics` moves them into totals that
the host may copy whenever it likes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SUMS = ("tokens", "activations", "mass", "kept_mass")
TOTALS = ("steps", "tokens", "activations", "mass", "kept_mass", "distinct_experts")


class StepSums(NamedTuple):
    """One step's sums of L MoE layers with E experts, cleared by `step_statistics`.

    sums: (L, 4) float32 in the order of `SUMS`: tokens that are not padding, kept slots, router
        weight before and after (before any gain). Counts are exact up to 2**24 slots a step.
    lit: (L, E) int8, 1 for each expert with at least one kept slot.
    """

    sums: torch.Tensor
    lit: torch.Tensor


def make_step_sums(num_layers: int, num_experts: int, device: torch.device | str) -> StepSums:
    """Allocate cleared sums."""
    return StepSums(
        torch.zeros(num_layers, len(SUMS), dtype=torch.float32, device=device),
        torch.zeros(num_layers, num_experts, dtype=torch.int8, device=device),
    )


def make_totals(num_layers: int, device: torch.device | str) -> torch.Tensor:
    """Allocate cleared totals: (L, 6) float64 in the order of `TOTALS`."""
    return torch.zeros(num_layers, len(TOTALS), dtype=torch.float64, device=device)


def add_to_sums_torch(
    step: StepSums, layer_index: int, weights: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor
) -> None:
    """Add one layer's routing, in place.

    weights: (T, K) float and ids: (T, K) int as routed, -1 for slots that are not there; kept:
    (T, K) bool. A row without any slot is padding and counts for nothing.
    """
    present = ids >= 0
    kept = kept & present
    mass = weights.float().masked_fill(~present, 0.0)
    added = (present.any(dim=1).sum(), kept.sum(), mass.sum(), mass.masked_fill(~kept, 0.0).sum())
    step.sums[layer_index] += torch.stack([value.float() for value in added])
    step.lit[layer_index, ids[kept].long()] = 1


def step_statistics_torch(step: StepSums, totals: torch.Tensor) -> None:
    """Add a step's sums to the totals and clear them, both in place.

    totals: (L, 6) float64 as from `make_totals`. A layer that saw no token since the last call
    (another model's, or an idle step's) adds nothing, not even a step.
    """
    seen = (step.sums[:, 0] > 0).double()
    distinct = step.lit.sum(dim=1, dtype=torch.int64).double()
    totals += torch.column_stack((seen, step.sums.double(), distinct)) * seen[:, None]
    step.sums.zero_()
    step.lit.zero_()
