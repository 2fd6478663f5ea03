"""Offline story, judging: published ways to give each layer a whole number of slots."""

from collections.abc import Iterator
from concurrent.futures import Executor
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang_alloc.reference.allocations import layer_allocation
from sglang_alloc.reference.experts import run_experts
from sglang_alloc.reference.model import ReferenceModel
from sglang_alloc.reference.sensitivity import entering_states, loss_from_layer

LEXI_TOKENS = 2_048
SCHEDULES_MEASURED = 6


def uniform_quotas(budget: int, layers: int) -> list[int]:
    """Return the most even quotas (L,) of a budget; a remainder is spread over the depth."""
    return [budget * (layer + 1) // layers - budget * layer // layers for layer in range(layers)]


@torch.no_grad()
def published_profile(
    model: ReferenceModel, windows: Tensor, executor: Executor
) -> NDArray[np.float64]:
    """S (L, K) of Alloc-L as published (arXiv 2604.08133): perplexity, later layers at top-1."""
    layers, top_k = model.config.num_layers, model.config.top_k
    entering = entering_states(model, windows)

    def perplexity(place: tuple[int, int]) -> float:
        layer, k = place
        quotas = [top_k] * layer + [k] + [1] * (layers - layer - 1)
        rule = layer_allocation(quotas)
        return float(np.exp(loss_from_layer(model, layer, entering[layer], windows, rule)))

    found = list(executor.map(perplexity, product(range(layers), range(1, top_k + 1))))
    return np.array(found).reshape(layers, top_k)


@torch.no_grad()
def lexi_profile(model: ReferenceModel, seed: int) -> NDArray[np.float64]:
    """S (L, K) of LExI (arXiv 2509.02753): ||Y_k - Y_K|| of each layer on Gaussian input."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    rows = []
    for layer in range(config.num_layers):
        norm = model.get_parameter(f"layers.{layer}.post_attention_layernorm.weight")
        x = torch.randn(LEXI_TOKENS, config.hidden_size, generator=generator) * norm
        rows.append(_distances(model, layer, x))
    return np.array(rows)


def _distances(model: ReferenceModel, layer: int, x: Tensor) -> list[float]:
    _, ids, weights = model.get_submodule(f"layers.{layer}.mlp").route(x)  # type: ignore[operator]
    gate_up = model.get_parameter(f"layers.{layer}.mlp.gate_up")
    down = model.get_parameter(f"layers.{layer}.mlp.down")
    outputs = [
        run_experts(x, weights[:, :k], gate_up, down, ids[:, :k])
        for k in range(1, model.config.top_k + 1)
    ]
    return [float((output - outputs[-1]).norm()) for output in outputs]


def best_schedule(
    model: ReferenceModel, windows: Tensor, sensitivity: NDArray[np.float64], budget: int
) -> list[int]:
    """The four-number layer schedule (arXiv 2505.03531) of least calibration loss at a budget.

    All schedules of the budget are ranked by summed sensitivity (L, K) and the best
    SCHEDULES_MEASURED of them measured.
    """
    layers, top_k = sensitivity.shape
    candidates = {tuple(row) for row in schedules(layers, top_k) if sum(row) == budget}
    candidates |= {tuple(uniform_quotas(budget, layers))}

    def predicted(row: tuple[int, ...]) -> float:
        return float(sum(sensitivity[layer, k - 1] for layer, k in enumerate(row)))

    ranked = sorted(candidates, key=lambda row: (predicted(row), row))[:SCHEDULES_MEASURED]
    x = model.embed_tokens(windows[:, :-1])

    def measured(row: tuple[int, ...]) -> float:
        with torch.no_grad():
            return loss_from_layer(model, 0, x, windows, layer_allocation(row))

    best = min(ranked, key=measured)
    return list(best)


def schedules(layers: int, top_k: int) -> Iterator[list[int]]:
    """Every schedule: slots at the first layer, at layer p and at the last one, linear between."""
    every = range(1, top_k + 1)
    for turn, first, middle, last in product(range(1, layers - 1), every, every, every):
        row = np.interp(range(layers), [0, turn, layers - 1], [first, middle, last])
        yield [int(k) for k in np.floor(row + 0.5)]
