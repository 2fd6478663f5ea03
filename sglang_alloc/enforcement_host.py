"""Data story: the budget on eager CPU execution, where a full budget costs one comparison."""

from __future__ import annotations

import numpy as np
import torch

from sglang_alloc.enforcement import EnforcementTables, Phase, RoutedSlots
from sglang_alloc_kernels.drop_slots import drop_slots_torch
from sglang_alloc_kernels.layer_quota import layer_quota_torch
from sglang_alloc_kernels.score_threshold import score_threshold_torch
from sglang_alloc_kernels.token_selection import token_selection_torch


class HostEnforcement:
    """Reads quotas as Python numbers, so a layer at full quota returns its slots untouched."""

    def __init__(self, tables: EnforcementTables) -> None:
        self._tables = tables
        self._rows = {"prefill": tables.prefill, "decode": tables.decode}
        self._budgets = {"prefill": tables.budget_max, "decode": tables.budget_max}
        self._saliency = (
            None if tables.saliency is None else torch.from_numpy(np.array(tables.saliency))
        )
        self._phase: Phase = "decode"

    def set_budgets(self, prefill_budget: int, decode_budget: int) -> None:
        self._budgets = {"prefill": prefill_budget, "decode": decode_budget}

    def begin_forward(self, phase: Phase) -> None:
        self._phase = phase

    def drops_slots(self) -> bool:
        return self._budgets[self._phase] < self._tables.budget_max

    def drop(self, layer_index: int, slots: RoutedSlots) -> RoutedSlots:
        if not self.drops_slots():
            return slots
        phase = self._phase
        routed_width = slots.ids.shape[1] - slots.num_shared
        weights = slots.weights[:, :routed_width]
        ids = slots.ids[:, :routed_width]
        kept = self._kept(layer_index, weights, ids, phase)
        new_weights, new_ids = drop_slots_torch(weights, ids, kept)
        gain = self._gain(layer_index, phase)
        if gain != 1.0:
            new_weights *= gain
        return _with_shared_columns(new_weights, new_ids, slots, routed_width)

    def _kept(
        self, layer_index: int, weights: torch.Tensor, ids: torch.Tensor, phase: Phase
    ) -> torch.Tensor:
        rows = self._rows[phase]
        row = self._budgets[phase] - self._tables.budget_min
        if self._tables.mode == "threshold":
            assert rows.thresholds is not None  # checked when the table was bound
            scores = self._scores(layer_index, weights, ids)
            return score_threshold_torch(scores, float(rows.thresholds[row, layer_index]))
        quota = int(rows.quotas[row, layer_index])
        if self._tables.mode == "token":
            return token_selection_torch(weights, quota, valid=(ids >= 0).any(dim=1))
        return layer_quota_torch(weights, quota)

    def _scores(self, layer_index: int, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if self._saliency is None:
            return weights
        return weights * self._saliency[layer_index][ids.clamp(min=0).long()]

    def _gain(self, layer_index: int, phase: Phase) -> float:
        gains = self._rows[phase].gains
        if gains is None:
            return 1.0
        return float(gains[self._budgets[phase] - self._tables.budget_min, layer_index])


def _with_shared_columns(
    weights: torch.Tensor, ids: torch.Tensor, slots: RoutedSlots, routed_width: int
) -> RoutedSlots:
    if slots.num_shared == 0:
        return RoutedSlots(weights, ids, 0)
    return RoutedSlots(
        torch.cat([weights, slots.weights[:, routed_width:]], dim=1),
        torch.cat([ids, slots.ids[:, routed_width:]], dim=1),
        slots.num_shared,
    )
