"""Offline story, profiling: what the loss suffers when one layer alone keeps its top k."""

from concurrent.futures import Executor
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from sglang_alloc.reference.allocations import layer_allocation
from sglang_alloc.reference.model import Allocation, ReferenceModel


@torch.no_grad()
def profile_sensitivity(
    model: ReferenceModel, windows: Tensor, executor: Executor, *, renormalize: bool = False
) -> Tensor:
    """Return S (L, K) float64: loss with layer l at top-(k+1) and the others full, minus full.

    windows (B, S + 1). The isolated profile: on small models the published one, with all later
    layers at top-1, predicts worse. The layers before l are run once for all. The last column is 0.
    """
    layers, top_k = model.config.num_layers, model.config.top_k
    entering = entering_states(model, windows)
    full = loss_from_layer(model, layers, entering[-1], windows, None)

    def loss_at(place: tuple[int, int]) -> float:
        layer, k = place
        quotas = [k if index == layer else top_k for index in range(layers)]
        allocation = layer_allocation(quotas, renormalize=renormalize)
        return loss_from_layer(model, layer, entering[layer], windows, allocation)

    losses = list(executor.map(loss_at, product(range(layers), range(1, top_k))))
    reduced = torch.tensor(losses, dtype=torch.float64).view(layers, top_k - 1) - full
    return torch.cat([reduced, torch.zeros(layers, 1, dtype=torch.float64)], dim=1)


@torch.no_grad()
def entering_states(model: ReferenceModel, windows: Tensor) -> list[Tensor]:
    """Hidden states (B, S, H) in front of each layer of the full model, and behind the last."""
    states = [model.embed_tokens(windows[:, :-1])]
    for layer in range(model.config.num_layers):
        states.append(model.run_layer(layer, states[-1])[0])
    return states


@torch.no_grad()
def loss_from_layer(
    model: ReferenceModel, first: int, x: Tensor, windows: Tensor, allocation: Allocation | None
) -> float:
    """Mean loss of windows (B, S + 1) given the hidden states in front of layer `first`."""
    for layer in range(first, model.config.num_layers):
        x, _ = model.run_layer(layer, x, allocation)
    logits = model.logits(x)
    return float(functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
