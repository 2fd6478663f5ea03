"""Offline story, calibrating: a factor per layer and budget that makes up for dropped experts.

Without its dropped slots a layer's output is too small on average. The factor is the one of least
squares between the output with all slots and the output with the kept ones; it costs nothing at run
time. A token-wise rescaling to the full mass overdoes it: RULES.md of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_alloc.reference.experts import run_experts
from sglang_alloc.reference.model import Allocation, ReferenceModel


class GainCalibration:
    """Wraps an allocation; sets each layer's gain when the layer runs and applies it.

    A layer is calibrated behind layers that have theirs already, as it will be served.
    """

    def __init__(self, model: ReferenceModel, allocation: Allocation) -> None:
        self._model = model
        self._allocation = allocation
        self.gains: dict[int, float] = {}

    @torch.no_grad()
    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        reduced = self._allocation(layer, x, ids, weights)
        gate_up = self._model.get_parameter(f"layers.{layer}.mlp.gate_up")
        down = self._model.get_parameter(f"layers.{layer}.mlp.down")
        full = run_experts(x, weights, gate_up, down, ids)
        kept = run_experts(x, reduced, gate_up, down, ids)
        self.gains[layer] = float((full * kept).sum() / (kept * kept).sum())
        return reduced * self.gains[layer]


def gained(allocation: Allocation, gains: Sequence[float]) -> Allocation:
    """Multiply what an allocation keeps in layer l by gains[l]."""

    def allocate(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return allocation(layer, x, ids, weights) * gains[layer]

    return allocate
