"""Data story, step 8 on the host, where requests of a forward have budgets of their own."""

from __future__ import annotations

import numpy as np
import torch

from sglang_alloc.allocation_mode import Phase
from sglang_alloc.enforcement import EnforcementTables, PhaseRows
from sglang_alloc_kernels.drop_slots import drop_slots_torch
from sglang_alloc_kernels.reference_mass import reference_factor_torch
from sglang_alloc_kernels.score_threshold import score_threshold_torch
from sglang_alloc_kernels.slot_rank import slot_rank_torch
from sglang_alloc_kernels.token_selection import token_selection_torch
from sglang_alloc_kernels.union_selection import (
    opened_selection_torch,
    union_selection_torch,
)


class TokenRows:
    """The row of the tables that each token of a forward obeys."""

    def __init__(self, tables: EnforcementTables, phase: Phase, budgets: np.ndarray) -> None:
        """`budgets` (T,): activations per token; the full one leaves a token as it was routed."""
        self._tables = tables
        self._phase = phase
        self._rows: PhaseRows = tables.prefill if phase == "prefill" else tables.decode
        self._index = budgets - tables.budget_min
        self._full = budgets == tables.budget_max
        self.drops_slots = not bool(self._full.all())

    def drop(
        self, layer_index: int, weights: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (weights, ids), both (T, K), after each token's own limit and corrections."""
        kept = self._kept(layer_index, weights, ids, scores) & (ids >= 0)
        new_weights, new_ids = drop_slots_torch(weights, ids, kept)
        references = self._limits(self._rows.references, layer_index, self._tables.top_k)
        if references is not None:
            new_weights = new_weights * reference_factor_torch(weights, kept, scores, references)
        gains = self._limits(self._rows.gains, layer_index, 1.0)
        if gains is not None:
            new_weights = new_weights * gains
        return new_weights, new_ids

    def _kept(
        self, layer_index: int, weights: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        mode, top_k = self._tables.mode_of(self._phase), self._tables.top_k
        if self._tables.rule_of(self._phase) == "threshold":
            thresholds = self._limits(self._rows.thresholds, layer_index, -np.inf)
            assert thresholds is not None  # checked when the table was bound
            passing = score_threshold_torch(scores, thresholds)
            if mode == "threshold":
                return passing
            return opened_selection_torch(scores, ids, passing, self._tables.num_experts)
        quotas = self._limits(self._rows.quotas, layer_index, top_k)
        assert quotas is not None
        if mode == "token":
            return self._selected(layer_index, weights, ids)
        if mode == "union":
            return union_selection_torch(scores, ids, quotas, self._tables.num_experts)
        return slot_rank_torch(weights) < quotas

    def _selected(self, layer_index: int, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Let tokens of one budget compete with each other; those of the full one keep all."""
        routed = (ids >= 0).any(dim=1)
        kept = torch.from_numpy(self._full)[:, None].expand_as(ids)
        for row in np.unique(self._index[~self._full]):
            contending = routed & torch.from_numpy(self._index == row)
            quota = int(self._rows.quotas[row, layer_index])
            kept = kept | token_selection_torch(weights, quota, valid=contending)
        return kept

    def _limits(
        self, rows: np.ndarray | None, layer_index: int, full: float
    ) -> torch.Tensor | None:
        """Return one layer's column of some rows for each token, (T, 1), float32."""
        if rows is None:
            return None
        values = np.where(self._full, full, rows[self._index, layer_index]).astype(np.float32)
        return torch.from_numpy(values)[:, None]
