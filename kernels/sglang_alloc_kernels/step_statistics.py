"""What routing did in a step, counted on the device beside the routing itself.

The routing kernels add to `StepSums`. Once a step, `step_statistics` moves them into totals that
the host may copy whenever it likes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

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
    (T, K) bool. A row without any slot is padding and counts for nothing; a weight that is NaN
    counts as 0, so that one broken request does not end the measuring.
    """
    present = ids >= 0
    kept = kept & present
    mass = torch.where(present & ~torch.isnan(weights), weights.float(), 0.0)
    added = (present.any(dim=1).sum(), kept.sum(), mass.sum(), mass.masked_fill(~kept, 0.0).sum())
    step.sums[layer_index] += torch.stack([value.float() for value in added])
    num_experts = step.lit.shape[1]
    experts = torch.where(kept, ids, num_experts).flatten().long()
    lit = step.lit.new_zeros(num_experts + 1).scatter_(0, experts, 1)
    step.lit[layer_index] |= lit[:num_experts]


def step_statistics_torch(
    step: StepSums, totals: torch.Tensor, part: torch.Tensor | None = None
) -> None:
    """Add a step's sums to the totals and clear them, both in place.

    totals: (L, 6) float64 as from `make_totals`; or several of them, (P, L, 6), of which `part`,
    (1,) int32 on the device, names the one to add to. A layer that saw no token since the last
    call (another model's, or an idle step's) adds nothing, not even a step.
    """
    everyone = torch.ones((), dtype=torch.bool, device=totals.device)
    if part is None:
        _add_totals(step, totals, everyone)
    else:
        for index, one in enumerate(totals):
            _add_totals(step, one, everyone & (part == index))
    step.sums.zero_()
    step.lit.zero_()


def _add_totals(step: StepSums, totals: torch.Tensor, chosen: torch.Tensor) -> None:
    """Add the step to the totals (L, 6) where `chosen`, one bool, says so."""
    seen = (step.sums[:, 0] > 0) & chosen
    distinct = step.lit.sum(dim=1, dtype=torch.int64).double()
    added = torch.column_stack((torch.ones_like(distinct), step.sums.double(), distinct))
    totals += torch.where(seen[:, None], added, 0.0)


@triton.jit
def add_to_sums_tile(sums_ptr, lit_ptr, layer_index, weights, ids, kept, routed, NUM_EXPERTS):
    """Add a tile's routing (T, K) to one layer's sums, as `add_to_sums_torch`; kept is present."""
    present = routed & (ids >= 0)
    tokens = tl.sum((tl.sum(present.to(tl.int32), axis=1) > 0).to(tl.float32))
    mass = tl.where(present & (weights == weights), weights, 0.0)
    activations = tl.sum(tl.sum(kept.to(tl.float32), axis=1))
    kept_mass = tl.sum(tl.sum(tl.where(kept, mass, 0.0), axis=1))
    mass = tl.sum(tl.sum(mass, axis=1))
    column = tl.arange(0, 4)
    counts = tl.where(column == 0, tokens, activations)
    added = tl.where(column < 2, counts, tl.where(column == 2, mass, kept_mass))
    # Read by a later launch alone, so nothing has to be ordered with them.
    tl.atomic_add(sums_ptr + layer_index * 4 + column, added, sem="relaxed")
    # Many slots may store the same 1.
    tl.store(lit_ptr + layer_index * NUM_EXPERTS + ids, 1, mask=kept)


def step_statistics(step: StepSums, totals: torch.Tensor, part: torch.Tensor | None = None) -> None:
    """As `step_statistics_torch`, in one launch for all layers."""
    num_layers, num_experts = step.lit.shape
    _step_statistics_kernel[(num_layers,)](
        *(step.sums, step.lit, totals, part, num_layers, num_experts),
        BLOCK_EXPERTS=triton.next_power_of_2(num_experts),
    )


@triton.jit
def _step_statistics_kernel(
    sums_ptr,  # (L, 4) float32
    lit_ptr,  # (L, E) int8
    totals_ptr,  # (L, 6) or (P, L, 6) float64
    part_ptr,  # (1,) int32 or None
    num_layers,
    num_experts,
    BLOCK_EXPERTS: tl.constexpr,
):
    """One program per layer."""
    layer = tl.program_id(0)
    experts = tl.arange(0, BLOCK_EXPERTS)
    lit_ptr += layer * num_experts + experts
    lit = tl.load(lit_ptr, mask=experts < num_experts, other=0)
    column = tl.arange(0, 8)  # of the totals: steps, the four sums, distinct experts
    is_sum = (column >= 1) & (column <= 4)
    sums = tl.load(sums_ptr + layer * 4 + column - 1, mask=is_sum, other=0.0).to(tl.float64)
    seen = tl.sum(tl.where(column == 1, sums, 0.0)) > 0
    added = tl.where(column == 0, 1.0, sums)
    added = tl.where(column == 5, tl.sum(lit.to(tl.int32)).to(tl.float64), added)
    totals_ptr += layer * 6 + column
    if part_ptr is not None:
        totals_ptr += tl.load(part_ptr) * num_layers * 6
    totals = tl.load(totals_ptr, mask=column < 6, other=0.0)
    tl.store(totals_ptr, totals + tl.where(seen, added, 0.0), mask=column < 6)
    tl.store(sums_ptr + layer * 4 + column - 1, 0.0, mask=is_sum)
    tl.store(lit_ptr, 0, mask=experts < num_experts)
