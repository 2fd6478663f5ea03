"""Data story: the budget on an accelerator, valid inside captured CUDA graphs.

The rows in force live in buffers at fixed addresses. A captured graph reads the buffers, never a
Python number, so a change of budget or phase is one small asynchronous copy before the forward.
"""

from __future__ import annotations

import numpy as np
import torch

from sglang_alloc.enforcement import PHASES, EnforcementTables, Phase, RoutedSlots
from sglang_alloc_kernels.drop_slots import drop_slots_torch
from sglang_alloc_kernels.layer_quota import layer_quota_torch
from sglang_alloc_kernels.reference_mass import reference_factor_torch
from sglang_alloc_kernels.score_threshold import score_threshold_torch


class DeviceEnforcement:
    """Keeps one row per layer on the device: quotas in mode `layer`, thresholds in `threshold`.

    Mode `token` needs a selection across tokens without a host sync, which the torch twin cannot
    give; the plugin refuses it on accelerators.
    """

    def __init__(self, tables: EnforcementTables, device: torch.device) -> None:
        self._tables = tables
        num_layers = tables.decode.quotas.shape[1]
        self._source = {phase: self._upload(tables, phase, device) for phase in PHASES}
        self._gain_source = {phase: self._upload_gains(tables, phase, device) for phase in PHASES}
        self._active = torch.empty(num_layers, dtype=torch.float32, device=device)
        self._active_gain = torch.ones(num_layers, dtype=torch.float32, device=device)
        self._reference_source = {
            phase: self._upload_references(tables, phase, device) for phase in PHASES
        }
        self._active_reference = torch.full((num_layers,), float(tables.top_k), device=device)
        self._saliency = (
            None
            if tables.saliency is None
            else torch.from_numpy(np.array(tables.saliency)).to(device)
        )
        self._budgets = {"prefill": tables.budget_max, "decode": tables.budget_max}
        self._loaded: tuple[Phase, int] | None = None
        self._load("decode")

    def set_budgets(self, prefill_budget: int, decode_budget: int) -> None:
        self._budgets = {"prefill": prefill_budget, "decode": decode_budget}

    def begin_forward(self, phase: Phase) -> None:
        if self._loaded != (phase, self._budgets[phase]):
            self._load(phase)

    def drops_slots(self) -> bool:
        return True  # the host cannot know what a replayed graph reads

    def buffer_address(self) -> int:
        """Return the address that captured graphs read the rows in force from."""
        return self._active.data_ptr()

    def drop(self, layer_index: int, slots: RoutedSlots) -> RoutedSlots:
        routed_width = slots.ids.shape[1] - slots.num_shared
        weights, ids = slots.weights[:, :routed_width], slots.ids[:, :routed_width]
        row = self._active[layer_index]
        if self._tables.mode == "threshold":
            kept = score_threshold_torch(self._scores(layer_index, weights, ids), row)
        else:
            kept = layer_quota_torch(weights, row)
        full = weights
        weights, ids = drop_slots_torch(weights, ids, kept)
        if self._tables.decode.references is not None:
            scores = self._scores(layer_index, full, slots.ids[:, :routed_width])
            reference = self._active_reference[layer_index]
            factor = reference_factor_torch(full, kept, scores, reference)
            weights = weights * factor.to(weights.dtype)
        if self._tables.decode.gains is not None:
            weights = weights * self._active_gain[layer_index].to(weights.dtype)
        if slots.num_shared:
            weights = torch.cat([weights, slots.weights[:, routed_width:]], dim=1)
            ids = torch.cat([ids, slots.ids[:, routed_width:]], dim=1)
        return RoutedSlots(weights, ids, slots.num_shared)

    def _scores(self, layer_index: int, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if self._saliency is None:
            return weights
        return weights * self._saliency[layer_index][ids.clamp(min=0).long()]

    def _load(self, phase: Phase) -> None:
        row = self._budgets[phase] - self._tables.budget_min
        self._active.copy_(self._source[phase][row], non_blocking=True)
        gains = self._gain_source[phase]
        if gains is not None:
            self._active_gain.copy_(gains[row], non_blocking=True)
        references = self._reference_source[phase]
        if references is not None:
            self._active_reference.copy_(references[row], non_blocking=True)
        self._loaded = (phase, self._budgets[phase])

    @staticmethod
    def _upload(tables: EnforcementTables, phase: Phase, device: torch.device) -> torch.Tensor:
        rows = tables.prefill if phase == "prefill" else tables.decode
        values = rows.thresholds if tables.mode == "threshold" else rows.quotas
        assert values is not None  # checked when the table was bound
        table = np.array(values, dtype=np.float32)
        if tables.mode == "threshold":
            table[-1] = -np.inf  # the full budget keeps every slot, whatever was calibrated
        return torch.from_numpy(table).to(device)

    @staticmethod
    def _upload_references(
        tables: EnforcementTables, phase: Phase, device: torch.device
    ) -> torch.Tensor | None:
        rows = tables.prefill if phase == "prefill" else tables.decode
        if rows.references is None:
            return None
        references = np.array(rows.references, dtype=np.float32)
        references[-1] = tables.top_k
        return torch.from_numpy(references).to(device)

    @staticmethod
    def _upload_gains(
        tables: EnforcementTables, phase: Phase, device: torch.device
    ) -> torch.Tensor | None:
        rows = tables.prefill if phase == "prefill" else tables.decode
        if rows.gains is None:
            return None
        gains = np.array(rows.gains, dtype=np.float32)
        gains[-1] = 1.0
        return torch.from_numpy(gains).to(device)
