"""Offline story, solving for mode `threshold`: fractional quotas from losses under thresholds.

A threshold can keep any mean number of slots, so its programme works in half slots, and on
sensitivities measured in the mode that will serve: see RULES.md of the model.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import product

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sglang_alloc.reference.model import ReferenceModel
from sglang_alloc.reference.sensitivity import entering_states, loss_from_layer
from sglang_alloc.reference.thresholds import ThresholdCalibration
from sglang_alloc.solve import solve_all_budgets

STEPS_PER_SLOT = 2


def threshold_quotas(
    model: ReferenceModel, windows: Tensor, saliency: Tensor | None, executor: Executor
) -> NDArray[np.float64]:
    """Return the mean kept slots of each layer for every budget, (N, L), N = L * (K - 1) + 1."""
    losses = profile_threshold_losses(model, windows, saliency, executor)
    # Each half slot is a choice of the programme: choice c stands for (c + 1) / 2 slots.
    choices = solve_all_budgets(losses).quotas[::STEPS_PER_SLOT]
    return (choices + (STEPS_PER_SLOT - 1)) / STEPS_PER_SLOT


def profile_threshold_losses(
    model: ReferenceModel, windows: Tensor, saliency: Tensor | None, executor: Executor
) -> NDArray[np.float64]:
    """Loss above full with one layer under a threshold that keeps q slots, the others full.

    Returns (L, choices) for q = 1, 1.5, ... K; made monotone, because a rise with q is noise.
    """
    layers = model.config.num_layers
    quotas = measured_quotas(model.config.top_k)
    entering = entering_states(model, windows)
    full = loss_from_layer(model, layers, entering[-1], windows, None)

    def loss_at(place: tuple[int, float]) -> float:
        layer, quota = place
        targets = [quota if index == layer else model.config.top_k for index in range(layers)]
        calibration = ThresholdCalibration(targets, saliency)
        return loss_from_layer(model, layer, entering[layer], windows, calibration) - full

    found = np.array(list(executor.map(loss_at, product(range(layers), quotas[:-1]))))
    losses = np.pad(found.reshape(layers, -1), [(0, 0), (0, 1)])
    choices = np.arange(STEPS_PER_SLOT, model.config.top_k * STEPS_PER_SLOT + 1) / STEPS_PER_SLOT
    every = np.stack([np.interp(choices, quotas, row) for row in losses])
    return np.maximum.accumulate(every[:, ::-1], axis=1)[:, ::-1]


def measured_quotas(top_k: int) -> Sequence[float]:
    """Half steps up to half the slots, where the loss bends; whole ones above."""
    half = top_k // 2
    return [*(np.arange(2, 2 * half) / 2).tolist(), *(float(k) for k in range(half, top_k + 1))]
