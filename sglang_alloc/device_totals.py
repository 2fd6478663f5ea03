"""Data story, the way back on a device: routing is counted there, and fetched without waiting.

Routing kernels add to sums, a kernel after the last layer moves those to totals of the phase, and
now and then the host asks for a copy, which it reads once the device has finished it.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_alloc.allocation_mode import PHASES, Phase
from sglang_alloc.threshold_drift import Kept
from sglang_alloc.worker_statistics import PhaseStatistics
from sglang_alloc_kernels.slot_rules import SlotRules
from sglang_alloc_kernels.step_statistics import TOTALS, make_step_sums


class DeviceTotals:
    """Sums of the step under way and totals of each phase, both at fixed addresses."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.sums = make_step_sums(num_layers, num_experts, device)
        shape = (len(PHASES), num_layers, len(TOTALS))
        self._totals = torch.zeros(shape, dtype=torch.float64, device=device)
        on_gpu = device.type == "cuda"
        self._copy = torch.zeros(shape, dtype=torch.float64, pin_memory=on_gpu)
        self._copied: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._asked = False
        self._last: dict[Phase, PhaseStatistics] = {}
        self._kept: dict[Phase, Kept] = {}

    def add_step(self, rules: SlotRules, phase_number: torch.Tensor) -> None:
        """Move the step's sums into the totals of the phase in force; may be captured."""
        rules.statistics(self.sums, self._totals, phase_number)

    def clear(self) -> None:
        """Forget everything, such as what graphs did while they were captured."""
        for tensor in (*self.sums, self._totals):
            tensor.zero_()

    def ask(self) -> None:
        """Start a copy to the host behind what the current stream has yet to do.

        Does nothing while the last copy was not taken: `by_phase` takes it.
        """
        if self._asked:
            return
        self._copy.copy_(self._totals, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._asked = True

    def by_phase(self) -> dict[Phase, PhaseStatistics]:
        """Return the totals of the last finished copy; empty before the first. Never waits."""
        if self._asked and (self._copied is None or self._copied.query()):
            for phase, totals in zip(PHASES, self._copy.clone(), strict=True):
                self._last[phase] = _statistics(totals)
                self._kept[phase] = _kept(totals)
            self._asked = False
        return self._last

    def kept_by_layer(self) -> dict[Phase, Kept]:
        """Return tokens and kept slots by layer, as of the last `by_phase`."""
        return self._kept


def _kept(totals: torch.Tensor) -> Kept:
    of = dict(zip(TOTALS, totals.T, strict=True))
    return Kept(int(of["tokens"].max()), of["activations"].numpy())


def _statistics(totals: torch.Tensor) -> PhaseStatistics:
    """Add up the layers' totals, (L, 6); every forward was measured."""
    of = dict(zip(TOTALS, totals.T, strict=True))
    forwards = int(of["steps"].max())
    return PhaseStatistics(
        forwards=forwards,
        sampled_forwards=forwards,
        tokens=int(of["tokens"].max()),
        activations=int(of["activations"].sum()),
        mass=float(of["mass"].sum()),
        kept_mass=float(of["kept_mass"].sum()),
        distinct_experts=int(of["distinct_experts"].sum()),
    )
