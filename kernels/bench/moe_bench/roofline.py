"""Bench, what hardware allows: the least time of a MoE layer from measured ceilings."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe_bench.shapes import BYTES_PER_WEIGHT, MoEShape
from moe_bench.timing import Timer

COPY_BYTES = 2**30
MATMUL_SIZE = 8192


class Ceilings(NamedTuple):
    """What this device was measured to do: bytes read and written, and operations, per second."""

    bytes_per_second: float
    flops_per_second: float


class Work(NamedTuple):
    """What one layer's experts had to do in a step."""

    num_tokens: int
    activations: int  # kept slots
    distinct_experts: int


def measure_ceilings(
    timer: Timer,
    device: torch.device,
    copy_bytes: int = COPY_BYTES,
    matmul_size: int = MATMUL_SIZE,
) -> Ceilings:
    """Time a kernel that reads `copy_bytes` and writes as many, and a bfloat16 matrix product.

    `copy_` would be no kernel: captured into a graph it is a memory operation, which got 2.8 TB/s
    on an H200 while the experts' kernels read 3.4 to 3.8.
    """
    source = torch.ones(copy_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = timer.seconds(lambda: torch.neg(source, out=target)).median
    square = torch.empty(matmul_size, matmul_size, dtype=torch.bfloat16, device=device).normal_()
    product = torch.empty_like(square)
    multiplied = timer.seconds(lambda: torch.mm(square, square, out=product)).median
    return Ceilings(2 * copy_bytes / copied, 2 * matmul_size**3 / multiplied)


def bytes_moved(shape: MoEShape, work: Work) -> int:
    """Return the bytes that must move: each distinct expert once, hidden states in and out."""
    activations = 2 * work.num_tokens * shape.hidden_size * BYTES_PER_WEIGHT
    return work.distinct_experts * shape.expert_bytes + activations


def operations(shape: MoEShape, work: Work) -> int:
    """Return the floating-point operations of the kept slots: three products each."""
    return work.activations * 6 * shape.hidden_size * shape.intermediate_size


def least_seconds(shape: MoEShape, work: Work, ceilings: Ceilings) -> float:
    """Return the time below which the layer cannot be: the slower of moving and computing."""
    return max(
        bytes_moved(shape, work) / ceilings.bytes_per_second,
        operations(shape, work) / ceilings.flops_per_second,
    )
