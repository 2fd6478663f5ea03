"""Offline story, judging: the corrections of the kept weights, on any rule.

Without them a comparison of rules is confounded: part of the loss is that outputs are too small.
"""

import torch
from torch import Tensor

from sglang_alloc.reference.gains import GainCalibration, gained
from sglang_alloc.reference.model import Allocation, ReferenceModel
from sglang_alloc.reference.sensitivity import loss_from_layer
from sglang_alloc_kernels.reference_mass import reference_factor_torch

# `none` leaves kept slots what the full top-k made them; `rescaled` normalises by the kept slots;
# `reference` by the top k2 (arXiv 2609.04575), k2 of least calibration loss; `gain` is a factor per
# layer, the scalar form of a per-layer affine correction (arXiv 2609.09241).
CORRECTIONS = ("none", "rescaled", "reference", "gain")


def corrected(
    model: ReferenceModel, rule: Allocation, calibration: Tensor, correction: str
) -> Allocation:
    """Put a correction of CORRECTIONS on what `rule` keeps, set on calibration windows."""
    if correction == "none":
        return rule
    if correction == "rescaled":
        return normalised(rule, 1)
    if correction == "reference":
        return normalised(rule, best_reference(model, rule, calibration))
    calibrating = GainCalibration(model, rule)
    with torch.no_grad():
        model(calibration[:, :-1], calibrating)
    return gained(rule, [calibrating.gains[index] for index in range(model.config.num_layers)])


def normalised(rule: Allocation, reference: int) -> Allocation:
    """Normalise by the mass of the top `reference` slots and of the kept ones."""

    def allocate(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        reduced = rule(layer, x, ids, weights)
        return reduced * reference_factor_torch(weights, reduced != 0, weights, reference)

    return allocate


@torch.no_grad()
def best_reference(model: ReferenceModel, rule: Allocation, calibration: Tensor) -> int:
    """The k2 from half the slots up, but for K itself, of least loss on calibration windows."""
    x, top_k = model.embed_tokens(calibration[:, :-1]), model.config.top_k

    def loss(reference: int) -> float:
        return loss_from_layer(model, 0, x, calibration, normalised(rule, reference))

    return min(range(top_k // 2, top_k), key=loss)
