"""Offline story, profiling for mode `union`: what the loss suffers when a layer's set is small.

Decode runs the tokens of several requests at once. Here the windows of a batch stand for requests,
and their tokens at one position for a step.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang_alloc.reference.allocations import scores
from sglang_alloc.reference.model import Allocation, ReferenceModel
from sglang_alloc.reference.sensitivity import entering_states, loss_from_layer
from sglang_alloc_kernels.slot_rank import slot_rank_torch


def union_allocation(quotas: Sequence[int], saliency: Tensor, batch: int, steps: int) -> Allocation:
    """Mode `union` over batches of `batch` windows of `steps` tokens each.

    Per step and layer, each token's quotas[layer] slots of largest weight times saliency (L, E)
    open the set of experts; its other slots stay where their expert is in the set. The windows'
    number must be a multiple of `batch`.
    """
    num_experts = saliency.shape[1]

    def allocate(layer: int, _x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        top_k = ids.shape[1]
        # (T, K) is (groups * batch * steps, K): bring the tokens of one step together.
        by_step = ids.view(-1, batch, steps, top_k).transpose(1, 2)
        rank = slot_rank_torch(scores(layer, ids, weights, saliency))
        opening = (rank < int(quotas[layer])).view(-1, batch, steps, top_k).transpose(1, 2)
        opened = torch.where(opening, by_step, num_experts).flatten(2)
        in_set = torch.zeros(*opened.shape[:2], num_experts + 1, dtype=torch.bool)
        in_set.scatter_(2, opened, True)
        in_set[..., num_experts] = False
        kept = in_set.gather(2, by_step.flatten(2)).view(by_step.shape).transpose(1, 2)
        return weights.masked_fill(~kept.reshape(weights.shape), 0.0)

    return allocate


def distinct_experts(kept_ids: Tensor, batch: int, steps: int, num_experts: int) -> float:
    """Mean number of distinct experts of a step, from kept ids (T, K) that are -1 where dropped."""
    by_step = kept_ids.view(-1, batch, steps, kept_ids.shape[1]).transpose(1, 2).flatten(2)
    seen = torch.zeros(*by_step.shape[:2], num_experts + 1, dtype=torch.bool)
    seen.scatter_(2, torch.where(by_step < 0, num_experts, by_step), True)
    return float(seen[..., :num_experts].sum(-1).float().mean())


@torch.no_grad()
def profile_union_losses(
    model: ReferenceModel, windows: Tensor, saliency: Tensor, batch: int, executor: Executor
) -> NDArray[np.float64]:
    """Return S (L, K): loss when top-(k+1) of each token open layer l's set, the others full.

    windows (B, S + 1), B a multiple of `batch`. Made monotone, because a rise with k is noise.
    """
    layers, top_k = model.config.num_layers, model.config.top_k
    entering = entering_states(model, windows)
    full = loss_from_layer(model, layers, entering[-1], windows, None)

    def loss_at(place: tuple[int, int]) -> float:
        layer, k = place
        quotas = [k if index == layer else top_k for index in range(layers)]
        rule = union_allocation(quotas, saliency, batch, windows.shape[1] - 1)
        return loss_from_layer(model, layer, entering[layer], windows, rule) - full

    found = np.array(list(executor.map(loss_at, product(range(layers), range(1, top_k)))))
    losses = np.pad(found.reshape(layers, -1), [(0, 0), (0, 1)])
    return np.maximum.accumulate(losses[:, ::-1], axis=1)[:, ::-1]
