"""Mode `union`: a step's tokens share one set of experts, opened by some slots of each token.

Decode is bound by the bytes of distinct experts, so a slot whose expert is read anyway costs
nothing (OEA, arXiv 2511.02237). With a cap the set grows by summed weight, as in XShare
(arXiv 2602.07265).
"""

from __future__ import annotations

import torch
import triton.language as tl

from sglang_alloc_kernels.slot_rank import slot_rank_torch

# Candidates' scores are summed in fixed point, whose sum does not depend on the order: every rank
# of a tensor-parallel group decides alike.
SCORE_STEPS = tl.constexpr(1 << 20)
SCORE_MAX = tl.constexpr(float(1 << 20))


def union_selection_torch(
    scores: torch.Tensor,
    ids: torch.Tensor,
    opening_slots: int | torch.Tensor,
    num_experts: int,
    *,
    cap: int | torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `opened_selection_torch` where each token's best slots open the set.

    opening_slots: how many of them (k0): a number, a tensor of one element on the device, or (T, 1)
    of them.
    """
    present = ids >= 0 if valid is None else (ids >= 0) & valid[:, None]
    ranks = slot_rank_torch(scores.masked_fill(~present, float("-inf")))
    opening = ranks < opening_slots
    return opened_selection_torch(scores, ids, opening, num_experts, cap=cap, valid=valid)


def opened_selection_torch(
    scores: torch.Tensor,
    ids: torch.Tensor,
    opening: torch.Tensor,
    num_experts: int,
    *,
    cap: int | torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the kept mask: opening slots, and riders whose expert is in the step's set.

    scores: (T, K) float; ids: (T, K) int of routed experts below `num_experts`, -1 where absent;
    opening: (T, K) bool, the slots that open the set, of which absent ones do not count; valid:
    (T,) bool, False for padding rows, which open nothing and keep nothing.

    cap: distinct experts of the step. The opening slots are guaranteed and come first; while the
    set is smaller than the cap, it takes the expert with the largest summed score over the other
    slots (ties: the smaller id). Where the opening slots alone need more than the cap, the
    guarantee wins and the set is exactly theirs. Without a cap the set is always exactly theirs.
    Returns (T, K) bool; runs without a host sync.
    """
    present = ids >= 0 if valid is None else (ids >= 0) & valid[:, None]
    experts = torch.where(present, ids, num_experts).long()
    in_set = _lit_experts(experts, opening & present, num_experts)
    if cap is not None:
        in_set = in_set | _fill_up(scores, experts, in_set, cap)
    return present & in_set[experts]


def _lit_experts(experts: torch.Tensor, opening: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return which experts the opening slots need, (E + 1,) bool; the last one stands for none."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, experts.flatten(), opening.flatten().long())
    return counts > 0


def _fill_up(
    scores: torch.Tensor, experts: torch.Tensor, in_set: torch.Tensor, cap: int | torch.Tensor
) -> torch.Tensor:
    """Return the heaviest experts outside the set that the cap has room for, (E + 1,) bool."""
    positive = scores.float().nan_to_num(0.0, neginf=0.0).clamp(0, SCORE_MAX.value)
    steps = (positive * SCORE_STEPS.value).long()
    mass = torch.zeros(len(in_set), dtype=torch.int64, device=scores.device)
    mass.scatter_add_(0, experts.flatten(), steps.flatten())
    mass = torch.where(in_set, -1, mass)
    mass[-1] = -1
    order = mass.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(mass), device=mass.device))
    return (mass > 0) & (rank < cap - in_set.sum())
