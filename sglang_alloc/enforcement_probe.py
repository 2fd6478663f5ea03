"""Offline story, inside the engine: probes of the profiler, applied where budgets are in service.

A row of a table of probes says how many slots each layer keeps. Mode `layer` keeps each token's
best ones as in service. Mode `threshold` keeps that many on average over the forward, ranked by
weight times saliency: what a threshold calibrated on these tokens would keep. Mode `union` opens a
layer's experts by each token's best ones and lets the other slots ride. Eager execution only.

A row may also have corrections: references, and gains that are found while it is in force.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sglang_alloc.allocation_mode import Phase
from sglang_alloc.enforcement import EnforcementTables, RoutedSlots
from sglang_alloc.gain_record import GainRecorder
from sglang_alloc.npz_file import read_npz, write_npz
from sglang_alloc.saliency_record import SaliencyRecorder
from sglang_alloc.score_histogram import BINS_PER_OCTAVE, LOWEST_OCTAVE, NUM_BINS
from sglang_alloc_kernels.drop_slots import drop_slots_torch
from sglang_alloc_kernels.reference_mass import reference_factor_torch
from sglang_alloc_kernels.slot_rank import slot_rank_torch


class ProbeRows(NamedTuple):
    """Rows of probes, (P, L) each: mean kept slots, k2 of references, and factors on the output.

    A gain of 0 is to be found while the row is in force.
    """

    quotas: np.ndarray
    references: np.ndarray | None = None
    gains: np.ndarray | None = None


class ProbeRecorders(NamedTuple):
    """What observes the expert layers meanwhile.

    Gains are found for the rows that ask for it. A saliency that is recorded while the full model
    is in force counts from the first other probe on.
    """

    gains: GainRecorder | None = None
    saliency: SaliencyRecorder | None = None


NO_RECORDERS = ProbeRecorders()


class ProbeEnforcement:
    """Applies probes, and in mode `threshold` records how the scores of each row are spread."""

    def __init__(
        self,
        tables: EnforcementTables,
        rows: ProbeRows,
        device: str,
        record: Path | None,
        recorders: ProbeRecorders = NO_RECORDERS,
    ) -> None:
        """`record` is the folder for histograms, on one rank only."""
        self._tables = tables
        self._rows = rows
        self._quotas = mean_quotas = rows.quotas
        self._recorder = recorders.gains
        self._saliency_recorder = recorders.saliency
        self._device = device
        self._full = tables.budget_max
        self._probe = self._full
        self._record = record if tables.mode == "threshold" else None
        num_layers = mean_quotas.shape[1]
        self._saliency = (
            None
            if tables.saliency is None
            else torch.from_numpy(np.array(tables.saliency)).to(device)
        )
        self._counts = torch.zeros(num_layers, NUM_BINS, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(num_layers, dtype=torch.int64)

    def set_budgets(self, prefill_budget: int, decode_budget: int) -> None:
        """Take a probe; both phases obey it. What the last one recorded is written first."""
        self._write_record()
        if self._recorder is not None:
            self._recorder.finish(self._probe)
        self._probe = prefill_budget
        if self._saliency_recorder is not None and self.drops_slots():
            self._take_saliency(self._saliency_recorder)

    def set_threshold_factors(self, prefill: Sequence[float], decode: Sequence[float]) -> None:
        """Do nothing: probes have no thresholds."""

    def begin_forward(
        self,
        phase: Phase,
        num_tokens: int | None = None,
        token_budgets: np.ndarray | None = None,
    ) -> None:
        """Do nothing: probes are the same in both phases, and for every request."""

    def drops_slots(self) -> bool:
        return self._probe != self._full

    def drop(self, layer_index: int, slots: RoutedSlots) -> RoutedSlots:
        width = slots.ids.shape[1] - slots.num_shared
        weights, ids = slots.weights[:, :width], slots.ids[:, :width]
        scores = self._scores(layer_index, weights, ids)
        if self._record is not None:
            self._observe(layer_index, scores, ids)
        if not self.drops_slots():
            return slots
        kept = self._kept(scores, ids, float(self._quotas[self._probe - 1, layer_index]))
        new_weights, new_ids = drop_slots_torch(weights, ids, kept)
        new_weights = self._corrected(layer_index, new_weights, (weights, kept, scores))
        if self._finds_gain(layer_index):
            assert self._recorder is not None
            self._recorder.expect(layer_index, slots)
        return RoutedSlots(
            torch.cat([new_weights, slots.weights[:, width:]], dim=1),
            torch.cat([new_ids, slots.ids[:, width:]], dim=1),
            slots.num_shared,
        )

    def _take_saliency(self, recorder: SaliencyRecorder) -> None:
        saliency = recorder.measured()
        if saliency is not None:
            self._saliency = torch.from_numpy(saliency.astype(np.float32)).to(self._device)
            self._saliency_recorder = None

    def _corrected(
        self,
        layer_index: int,
        reduced: torch.Tensor,
        routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        if self._rows.references is None:
            return reduced
        reference = int(self._rows.references[self._probe - 1, layer_index])
        if reference >= self._tables.top_k:
            return reduced
        return reduced * reference_factor_torch(*routed, reference)

    def _finds_gain(self, layer_index: int) -> bool:
        if self._rows.gains is None or self._recorder is None:
            return False
        return bool(self._rows.gains[self._probe - 1, layer_index] == 0.0)

    def _kept(self, scores: torch.Tensor, ids: torch.Tensor, quota: float) -> torch.Tensor:
        rank = slot_rank_torch(scores)
        mode = self._tables.mode
        if mode == "threshold":
            return _best_on_average(scores, rank, quota)
        opened = rank < round(quota)
        if mode != "union":
            return opened
        return torch.isin(ids, ids[opened])

    def _scores(self, layer_index: int, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if self._saliency is None:
            return weights
        return weights * self._saliency[layer_index][ids.clamp(min=0).long()]

    def _observe(self, layer_index: int, scores: torch.Tensor, ids: torch.Tensor) -> None:
        others = scores[(slot_rank_torch(scores) > 0) & (ids >= 0)]
        octave = torch.log2(others.float().clamp(min=2.0**LOWEST_OCTAVE)) - LOWEST_OCTAVE
        bins = (octave * BINS_PER_OCTAVE).long().clamp(0, NUM_BINS - 1)
        self._counts[layer_index] += torch.bincount(bins, minlength=NUM_BINS)
        self._tokens[layer_index] += int((ids >= 0).any(dim=1).sum())

    def _write_record(self) -> None:
        if self._record is None or not int(self._tokens.sum()):
            return
        path = self._record / f"scores-{self._probe}.npz"
        counts, tokens = self._counts.cpu().numpy(), self._tokens.numpy().copy()
        if path.exists():
            earlier = read_npz(path, "counts of scores")
            counts, tokens = counts + earlier["counts"], tokens + earlier["tokens"]
        write_npz(path, {"counts": counts, "tokens": tokens}, "counts of scores")
        self._counts.zero_()
        self._tokens.zero_()


def _best_on_average(scores: torch.Tensor, rank: torch.Tensor, quota: float) -> torch.Tensor:
    """Keep each token's best slot and, of the others, the best `(quota - 1) * T` together."""
    kept = rank == 0
    extra = round((quota - 1.0) * len(scores))
    contest = torch.where(kept | torch.isnan(scores), float("-inf"), scores).flatten()
    best = contest.argsort(descending=True, stable=True)[:extra]
    kept.view(-1)[best] = True
    return kept
