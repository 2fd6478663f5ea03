"""Bench, what is measured: the MoE layers of real models, and made-up routing for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_alloc_kernels.budgeted_routing import Router

BYTES_PER_WEIGHT = 2  # bfloat16


class MoEShape(NamedTuple):
    """The MoE layers of one model; shared experts are outside the budget and left out."""

    name: str
    hidden_size: int
    intermediate_size: int  # of one expert
    num_experts: int
    num_layers: int  # MoE layers of the whole model
    router: Router
    has_bias: bool = False  # whether a correction bias takes part in the choice
    grouped: bool = False  # whether SGLang routes it by its function for groups, be it one group

    @property
    def top_k(self) -> int:
        return self.router.top_k

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's three matrices."""
        return 3 * self.hidden_size * self.intermediate_size * BYTES_PER_WEIGHT


SHAPES = (
    MoEShape("DeepSeek-V2-Lite", 2048, 1408, 64, 26, Router(6, "softmax", False), grouped=True),
    MoEShape("Qwen3-30B-A3B", 2048, 768, 128, 48, Router(8, "softmax", True)),
    MoEShape(
        *("DeepSeek-V3", 7168, 2048, 256, 58, Router(8, "sigmoid", True, 8, 4, 2.5)),
        has_bias=True,
        grouped=True,
    ),
)
# For tests of this code, and for the part of the bench that a CPU can run.
SMALL = MoEShape("small", 64, 32, 16, 2, Router(4, "softmax", True))


class LayerInputs(NamedTuple):
    """Inputs of one MoE layer: hidden_states (T, H), router_logits (T, E), bias (E,) or None."""

    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    correction_bias: torch.Tensor | None


class ExpertWeights(NamedTuple):
    """w13 (E, 2I, H) holds gate above up, w2 (E, H, I)."""

    w13: torch.Tensor
    w2: torch.Tensor


def make_inputs(
    shape: MoEShape, num_tokens: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> LayerInputs:
    """Draw inputs: each expert has a popularity, each token a taste of its own.

    The tastes' spread is four times that of the popularities. Trained routers are balanced within a
    batch of mixed text, more or less so by model: the distinct experts of every case are measured
    and stand beside its time.
    """
    generator = torch.Generator().manual_seed(seed)
    popularity = 0.5 * torch.randn(1, shape.num_experts, generator=generator)
    tastes = 2.0 * torch.randn(num_tokens, shape.num_experts, generator=generator)
    hidden_states = torch.randn(num_tokens, shape.hidden_size, generator=generator) / 8
    bias = 0.1 * torch.randn(shape.num_experts, generator=generator) if shape.has_bias else None
    return LayerInputs(
        hidden_states.to(device, dtype),
        (popularity + tastes).to(device, torch.float32),
        None if bias is None else bias.to(device),
    )


def make_experts(shape: MoEShape, device: torch.device, dtype: torch.dtype) -> ExpertWeights:
    """Draw expert weights on the device, small enough that repeated use stays finite."""
    generator = torch.Generator(device).manual_seed(1)
    sizes = (
        (shape.num_experts, 2 * shape.intermediate_size, shape.hidden_size),
        (shape.num_experts, shape.hidden_size, shape.intermediate_size),
    )
    w13, w2 = (
        torch.empty(size, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
        for size in sizes
    )
    return ExpertWeights(w13, w2)
