"""The rules on routed slots, and their statistics, as a set: kernels, or their torch twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sglang_alloc_kernels.budgeted_routing import budgeted_routing, budgeted_routing_torch
from sglang_alloc_kernels.budgeted_slots import budgeted_slots, budgeted_slots_torch
from sglang_alloc_kernels.step_statistics import step_statistics, step_statistics_torch
from sglang_alloc_kernels.token_slots import token_slots, token_slots_torch
from sglang_alloc_kernels.union_slots import union_slots, union_slots_torch

SlotRule = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class SlotRules(NamedTuple):
    """One implementation of everything that a served step calls."""

    budgeted: SlotRule
    token: SlotRule
    union: SlotRule
    routing: SlotRule
    statistics: Callable[..., None]


KERNELS = SlotRules(budgeted_slots, token_slots, union_slots, budgeted_routing, step_statistics)
TWINS = SlotRules(
    budgeted_slots_torch,
    token_slots_torch,
    union_slots_torch,
    budgeted_routing_torch,
    step_statistics_torch,
)
