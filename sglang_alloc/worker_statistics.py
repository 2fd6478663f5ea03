"""Data story: what routing really did, measured on a sample of the forwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from sglang_alloc.allocation_mode import PHASES, Phase
from sglang_alloc.enforcement import RoutedSlots
from sglang_alloc.threshold_drift import Kept

if TYPE_CHECKING:
    import torch

# Measuring a layer costs tens of microseconds on a CPU: one forward in 16 keeps it out of sight.
SAMPLE_EVERY = {"prefill": 4, "decode": 16}


@dataclass
class PhaseStatistics:
    """Sums over the sampled forwards of one phase.

    tokens: tokens of the sampled forwards; activations: kept routed slots, summed over layers;
    mass and kept_mass: router weight before and after, summed over layers and tokens, where a
    weight that is NaN counts as 0: one broken request must not end the measuring;
    distinct_experts: experts with at least one kept slot, summed over layers.
    """

    forwards: int = 0
    sampled_forwards: int = 0
    tokens: int = 0
    activations: int = 0
    mass: float = 0.0
    kept_mass: float = 0.0
    distinct_experts: int = 0

    def since(self, earlier: PhaseStatistics) -> PhaseStatistics:
        """Return the sums that were added after `earlier`."""
        names = (field.name for field in fields(self))
        return PhaseStatistics(**{n: getattr(self, n) - getattr(earlier, n) for n in names})

    def activations_per_token(self) -> float | None:
        """Return the mean activations per token over all layers, or None before any sample."""
        return self.activations / self.tokens if self.tokens else None

    def kept_mass_ratio(self) -> float | None:
        """Return the kept share of the router's weight, or None before any sample."""
        return self.kept_mass / self.mass if math.isfinite(self.mass) and self.mass else None


class WorkerStatistics:
    """Counts forwards and decides which of them are measured. Host execution only."""

    def __init__(self, num_experts: int, num_layers: int = 0) -> None:
        self._num_experts = num_experts
        self._slots = {phase: np.zeros(num_layers) for phase in PHASES}
        self.by_phase: dict[Phase, PhaseStatistics] = {
            "prefill": PhaseStatistics(),
            "decode": PhaseStatistics(),
        }
        self._taken = {"prefill": PhaseStatistics(), "decode": PhaseStatistics()}
        self._sampled: PhaseStatistics | None = None
        self._phase: Phase = "decode"

    def take_recent(self, phase: Phase) -> PhaseStatistics:
        """Return what was measured since the last call for this phase."""
        recent = self.by_phase[phase].since(self._taken[phase])
        self._taken[phase] = replace(self.by_phase[phase])
        return recent

    def begin_forward(self, phase: Phase, num_tokens: int) -> None:
        """Start a forward; its routing is measured when it is the phase's turn."""
        self._sampled = None
        statistics, self._phase = self.by_phase[phase], phase
        if statistics.forwards % SAMPLE_EVERY[phase] == 0:
            statistics.sampled_forwards += 1
            statistics.tokens += num_tokens
            self._sampled = statistics
        statistics.forwards += 1

    def samples_this_forward(self) -> bool:
        """Return whether `observe` is wanted for the layers of the forward under way."""
        return self._sampled is not None

    def kept_by_layer(self, phase: Phase) -> Kept:
        """Return the measured tokens of a phase and the slots that each layer kept of them."""
        return Kept(self.by_phase[phase].tokens, self._slots[phase].copy())

    def observe(self, layer_index: int, before: RoutedSlots, after: RoutedSlots) -> None:
        """Add one layer's routed slots, before and after the budget was applied."""
        assert self._sampled is not None
        width = after.ids.shape[1] - after.num_shared
        ids = after.ids[:, :width]
        kept: torch.Tensor = ids >= 0
        kept_count = int(kept.sum())
        self._sampled.activations += kept_count
        self._slots[self._phase][layer_index] += kept_count
        weights = before.weights[:, :width].nan_to_num(nan=0.0)
        self._sampled.mass += float(weights.sum())
        self._sampled.kept_mass += float((weights * kept).sum())
        counts = ids[kept].long().bincount(minlength=self._num_experts)
        self._sampled.distinct_experts += int((counts > 0).sum())
