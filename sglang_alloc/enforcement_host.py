"""Data story: the budget on eager CPU execution, where a full budget costs one comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_alloc.allocation_mode import Phase
from sglang_alloc.enforcement import EnforcementTables, PhaseRows, RoutedSlots
from sglang_alloc.enforcement_tokens import TokenRows
from sglang_alloc_kernels.drop_slots import DROPPED, drop_slots_torch
from sglang_alloc_kernels.reference_mass import reference_factor_torch
from sglang_alloc_kernels.token_selection import token_selection_torch


class HostEnforcement:
    """Reads quotas as Python numbers, so a layer at full quota returns its slots untouched."""

    def __init__(self, tables: EnforcementTables) -> None:
        self._calibrated = self._tables = tables
        self._rows = {"prefill": tables.prefill, "decode": tables.decode}
        self._budgets = {"prefill": tables.budget_max, "decode": tables.budget_max}
        self._saliency = (
            None if tables.saliency is None else torch.from_numpy(np.array(tables.saliency))
        )
        self._phase: Phase = "decode"
        self._token_rows: TokenRows | None = None

    def set_budgets(self, prefill_budget: int, decode_budget: int) -> None:
        self._budgets = {"prefill": prefill_budget, "decode": decode_budget}

    def set_threshold_factors(self, prefill: Sequence[float], decode: Sequence[float]) -> None:
        self._tables = self._calibrated._replace(
            prefill=_scaled(self._calibrated.prefill, prefill),
            decode=_scaled(self._calibrated.decode, decode),
        )
        self._rows = {"prefill": self._tables.prefill, "decode": self._tables.decode}

    def begin_forward(
        self,
        phase: Phase,
        num_tokens: int | None = None,
        token_budgets: np.ndarray | None = None,
    ) -> None:
        self._phase = phase
        self._token_rows = (
            None if token_budgets is None else TokenRows(self._tables, phase, token_budgets)
        )

    def drops_slots(self) -> bool:
        if self._token_rows is not None:
            return self._token_rows.drops_slots
        return self._budgets[self._phase] < self._tables.budget_max

    def drop(self, layer_index: int, slots: RoutedSlots) -> RoutedSlots:
        if not self.drops_slots():
            return slots
        routed_width = slots.ids.shape[1] - slots.num_shared
        weights, ids = slots.weights[:, :routed_width], slots.ids[:, :routed_width]
        if self._token_rows is not None:
            scores = self._scores(layer_index, weights, ids)
            weights, ids = self._token_rows.drop(layer_index, weights, ids, scores)
            return _with_shared_columns(weights, ids, slots, routed_width)
        full, full_ids = weights, ids
        weights, ids = self._dropped(layer_index, full, full_ids)
        reference = self._reference(layer_index)
        if reference < self._tables.top_k:
            scores = self._scores(layer_index, full, full_ids)
            weights = weights * reference_factor_torch(full, ids >= 0, scores, reference)
        gain = self._gain(layer_index, self._phase)
        if gain != 1.0:
            weights *= gain
        return _with_shared_columns(weights, ids, slots, routed_width)

    def _dropped(
        self, layer_index: int, weights: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._rows[self._phase]
        row = self._budgets[self._phase] - self._tables.budget_min
        mode = self._tables.mode_of(self._phase)
        if self._tables.rule_of(self._phase) == "threshold":
            assert rows.thresholds is not None  # checked when the table was bound
            scores = self._scores(layer_index, weights, ids)
            threshold = float(rows.thresholds[row, layer_index])
            if mode == "threshold":
                return _drop_below(scores, threshold, weights, ids)
            opening = ids.masked_fill(_below(scores, threshold), DROPPED)
            return _drop_outside(opening, self._tables.num_experts, weights, ids)
        quota = int(rows.quotas[row, layer_index])
        if mode == "token":
            kept = token_selection_torch(weights, quota, valid=(ids >= 0).any(dim=1))
            return drop_slots_torch(weights, ids, kept)
        if mode == "union":
            scores = self._scores(layer_index, weights, ids)
            opening = ids.gather(1, _best(scores, quota, ids))
            return _drop_outside(opening, self._tables.num_experts, weights, ids)
        return _drop_beyond(quota, weights, ids)

    def _scores(self, layer_index: int, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return what the phase ranks slots by, for its rule and its references alike."""
        if self._saliency is None or not self._tables.ranks_by_saliency(self._phase):
            return weights
        return weights * self._saliency[layer_index][ids]  # -1 reads the last one, for nothing

    def _reference(self, layer_index: int) -> int:
        references = self._rows[self._phase].references
        if references is None:
            return self._tables.top_k
        row = self._budgets[self._phase] - self._tables.budget_min
        return int(references[row, layer_index])

    def _gain(self, layer_index: int, phase: Phase) -> float:
        gains = self._rows[phase].gains
        if gains is None:
            return 1.0
        return float(gains[self._budgets[phase] - self._tables.budget_min, layer_index])


def _scaled(rows: PhaseRows, factors: Sequence[float]) -> PhaseRows:
    """Return the rows with each layer's thresholds multiplied by its factor."""
    if rows.thresholds is None:
        return rows
    return rows._replace(thresholds=rows.thresholds.astype(np.float64) * np.array(factors))


def _drop_below(
    scores: torch.Tensor, threshold: float, weights: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what score_threshold_torch does, in 6 operations instead of 15: 3 us each count here."""
    dropped = _below(scores, threshold)
    return weights.masked_fill(dropped, 0.0), ids.masked_fill(dropped, DROPPED)


def _below(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return which slots score less than the threshold, but for each token's best one."""
    best = scores.nan_to_num(nan=-torch.inf).argmax(dim=1, keepdim=True)  # a NaN would be the best
    below = scores < threshold
    return below.scatter_(1, best, False)


def _drop_beyond(
    quota: int, weights: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what layer_quota_torch does, in 4 operations instead of 9."""
    comparable = weights.nan_to_num(nan=-torch.inf)
    worst = comparable.argsort(dim=1, descending=True, stable=True)[:, quota:]
    return weights.scatter(1, worst, 0.0), ids.scatter(1, worst, DROPPED)


def _best(scores: torch.Tensor, count: int, ids: torch.Tensor) -> torch.Tensor:
    """Return the columns of each token's `count` best slots, (T, count); absent ones come last."""
    comparable = scores.masked_fill(ids < 0, -torch.inf).nan_to_num(nan=-torch.inf)
    return comparable.argsort(dim=1, descending=True, stable=True)[:, :count]


def _drop_outside(
    opening: torch.Tensor, num_experts: int, weights: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what opened_selection_torch does without a cap, in 5 operations instead of 10.

    opening: ids of the slots that open the set, -1 for none.
    """
    outside = torch.ones(num_experts + 1, dtype=torch.bool)
    outside[opening] = False
    outside[DROPPED] = True  # where absent slots read and wrote
    dropped = outside[ids]
    return weights.masked_fill(dropped, 0.0), ids.masked_fill(dropped, DROPPED)


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
