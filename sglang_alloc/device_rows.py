"""Data story, step 7 on a device: the rows in force, at an address that captured graphs know.

Rows of every budget and both phases are uploaded once. Putting one in force is one copy on the
device, in the order of the stream, so a forward under way is never disturbed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sglang_alloc.allocation_mode import PHASES, Phase
from sglang_alloc.enforcement import EnforcementTables
from sglang_alloc_kernels.layer_rows import LayerRows

HEADER = 4  # the phase's number, then filler, so that rows begin at a multiple of 16 bytes


class DeviceRows:
    """One block of float32 in force: its phase's number, then limits, gains and references."""

    def __init__(self, tables: EnforcementTables, device: torch.device) -> None:
        blocks = {phase: _blocks(tables, phase) for phase in PHASES}
        self._source = {phase: torch.from_numpy(blocks[phase]).to(device) for phase in PHASES}
        self._budget_min = tables.budget_min
        self._block = torch.empty_like(self._source["decode"][0])
        self._loaded: tuple[Phase, int] | None = None
        num_layers = tables.decode.quotas.shape[1]
        parts = self._block[HEADER:].view(-1, num_layers)
        names = ["limits", *(name for name in ("gains", "references") if _of(tables, name))]
        plain = LayerRows(**dict(zip(names, parts, strict=True)))
        ranked = plain
        if tables.saliency is not None:
            saliency = torch.from_numpy(np.array(tables.saliency, dtype=np.float32))
            ranked = plain._replace(saliency=saliency.to(device))
        self._rows = {
            phase: ranked if tables.ranks_by_saliency(phase) else plain for phase in PHASES
        }
        self._factors: dict[Phase, torch.Tensor] = {}
        self.load("decode", tables.budget_max)

    def of(self, phase: Phase) -> LayerRows:
        """Return the tensors that the layers of a phase read; all but saliency are common."""
        return self._rows[phase]

    @property
    def phase_number(self) -> torch.Tensor:
        """The phase in force as its place in PHASES, (1,) int32 on the device."""
        return self._block[:1].view(torch.int32)

    def load(self, phase: Phase, budget: int) -> None:
        """Put the row of a budget in force, unless it is already."""
        if self._loaded == (phase, budget):
            return
        self._block.copy_(self._source[phase][budget - self._budget_min], non_blocking=True)
        if phase in self._factors:
            self._rows[phase].limits.mul_(self._factors[phase])
        self._loaded = (phase, budget)

    def set_limit_factors(self, factors: Mapping[Phase, Sequence[float]]) -> None:
        """Multiply the limits of each phase's layers by these, whatever the budget."""
        device = self._block.device
        self._factors = {
            phase: torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
            for phase, values in factors.items()
        }
        self._loaded = None  # what is in force has the earlier factors

    def address(self) -> int:
        """Return the address that captured graphs read from."""
        return self._block.data_ptr()


def _blocks(tables: EnforcementTables, phase: Phase) -> np.ndarray:
    """Return the blocks of all budgets, (N, HEADER + parts * L) float32."""
    rows = tables.prefill if phase == "prefill" else tables.decode
    is_threshold = tables.rule_of(phase) == "threshold"
    limits = rows.thresholds if is_threshold else rows.quotas
    assert limits is not None  # checked when the table was bound
    # The full budget keeps every slot and every weight as it is, whatever was calibrated.
    full = {
        "limits": -np.inf if is_threshold else tables.top_k,
        "gains": 1.0,
        "references": tables.top_k,
    }
    parts = {"limits": limits, "gains": rows.gains, "references": rows.references}
    header = np.zeros((len(limits), HEADER), dtype=np.float32)
    header[:, :1].view(np.int32)[:] = PHASES.index(phase)
    blocks = [header]
    for name, values in parts.items():
        if name == "limits" or _of(tables, name):
            filler = np.full_like(limits, full[name], dtype=np.float32)
            block = filler if values is None else np.array(values, dtype=np.float32)
            block[-1] = full[name]
            blocks.append(block)
    return np.concatenate(blocks, axis=1)


def _of(tables: EnforcementTables, name: str) -> bool:
    """Return whether either phase has this correction."""
    return any(getattr(rows, name) is not None for rows in (tables.prefill, tables.decode))
