"""Offline story, calibrating: each expert's saliency, and the score thresholds of every budget."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_alloc.reference.allocations import apply_kept, scores
from sglang_alloc.reference.experts import expert_output_norms
from sglang_alloc.reference.gains import GainCalibration
from sglang_alloc.reference.model import ReferenceModel
from sglang_alloc.reference.sensitivity import loss_from_layer
from sglang_alloc_kernels.reference_mass import reference_factor_torch
from sglang_alloc_kernels.score_threshold import score_threshold_torch


class CalibratedRow(NamedTuple):
    """Thresholds and gains of one budget (L,), and the loss they give on the calibration text."""

    thresholds: list[float]
    loss: float
    gains: list[float]


@torch.no_grad()
def measure_saliency(model: ReferenceModel, windows: Tensor) -> Tensor:
    """Return (L, E) float32: mean norm of each expert's unweighted output on its own tokens.

    An expert that no token chose gets its layer's mean.
    """
    config = model.config
    sums = torch.zeros(config.num_layers, config.num_experts, dtype=torch.float64)
    counts = torch.zeros_like(sums)

    def observe(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate_up = model.get_parameter(f"layers.{layer}.mlp.gate_up")
        down = model.get_parameter(f"layers.{layer}.mlp.down")
        sums[layer], counts[layer] = expert_output_norms(x, gate_up, down, ids)
        return weights

    model(windows[:, :-1], observe)
    typical = sums.sum(1, keepdim=True) / counts.sum(1, keepdim=True)
    return torch.where(counts > 0, sums / counts.clamp(min=1), typical).float()


def threshold_of_scores(slot_scores: Tensor, quota: float) -> float:
    """The threshold at which tokens keep `quota` of their slots on average.

    slot_scores (T, K); a token's best slot is kept whatever the threshold, so the threshold is the
    ((quota - 1) * T)-th largest of the other scores: exact up to ties and one slot in T.
    """
    tokens, top_k = slot_scores.shape
    if quota >= top_k:
        return 0.0
    others = slot_scores.sort(dim=1).values[:, :-1].flatten()
    extra = round((quota - 1) * tokens)
    if extra == 0:
        return float(torch.finfo(torch.float32).max)
    return float(others.topk(extra, sorted=False).values.min())


class ThresholdCalibration:
    """An allocation that sets each layer's threshold when the layer runs, from what it sees.

    A layer is calibrated on the hidden states that the reduced layers before it produce, because
    those are what it will see when it serves.
    """

    def __init__(
        self,
        quotas: Sequence[float],
        saliency: Tensor | None,
        reference: int | None = None,
    ) -> None:
        self._quotas, self._saliency, self._reference = quotas, saliency, reference
        self.thresholds: dict[int, float] = {}

    def __call__(self, layer: int, _x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        slot_scores = scores(layer, ids, weights, self._saliency)
        threshold = threshold_of_scores(slot_scores, self._quotas[layer])
        self.thresholds[layer] = threshold
        kept = score_threshold_torch(slot_scores, threshold)
        reduced = apply_kept(weights, kept, renormalize=False)
        if self._reference is None:
            return reduced
        return reduced * reference_factor_torch(weights, kept, slot_scores, self._reference)


@torch.no_grad()
def calibrate_thresholds(
    model: ReferenceModel,
    windows: Tensor,
    saliency: Tensor | None,
    quotas: Sequence[float],
    *,
    reference: int | None = None,
    with_gains: bool = False,
) -> CalibratedRow:
    """Set the thresholds at which layer l keeps quotas[l] slots per token on windows (B, S + 1).

    Without gains those are 1.
    """
    layers = range(len(quotas))
    calibration = ThresholdCalibration(quotas, saliency, reference)
    gaining = GainCalibration(model, calibration)
    x = model.embed_tokens(windows[:, :-1])
    loss = loss_from_layer(model, 0, x, windows, gaining if with_gains else calibration)
    thresholds = [calibration.thresholds[layer] for layer in layers]
    return CalibratedRow(thresholds, loss, [gaining.gains.get(layer, 1.0) for layer in layers])
