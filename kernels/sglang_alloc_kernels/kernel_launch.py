"""How the kernels are launched: their common pointers, and how many tokens one program takes."""

from __future__ import annotations

import os
from functools import cache

import torch
import triton

from sglang_alloc_kernels.layer_rows import LayerRows, StepTensors

# A program ranks slots by comparing all pairs of a token's slots: 16 a thread with 2 warps keeps
# its code short, which is what a small launch waits for.
PAIRS_PER_PROGRAM = 1024
# Set to 0 in the environment, lets `launches_early` say no.
EARLY_LAUNCH = "SGLANG_ALLOC_EARLY_LAUNCH"


def warps_of(pairs: int) -> int:
    """Return the warps of a program of so many pairs of slots.

    They were about the fastest at 8, 64 and 512 tokens of top-6 on an H200.
    """
    for warps, most in ((1, 512), (2, 1024), (4, 2048)):
        if pairs <= most:
            return warps
    return 8


@cache
def launches_early(device: torch.device) -> bool:
    """Return whether kernels on the device may be launched while the one before them still runs.

    Programmatic dependent launch, from NVIDIA's compute capability 9.0 on, hides part of a small
    launch. The kernel must wait (`gdc_wait`) before it touches memory.
    """
    if os.environ.get(EARLY_LAUNCH) == "0" or device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def kernel_pointers(rows: LayerRows, step: StepTensors) -> tuple[torch.Tensor | None, ...]:
    """Return limits, gains, references, saliency, num_valid, floors, ceilings, sums and lit."""
    sums = (None, None) if step.sums is None else step.sums
    return (
        *(rows.limits, rows.gains, rows.references, rows.saliency),
        *(step.num_valid_tokens, step.floors, step.ceilings),
        *sums,
    )


def empty_rows(like: torch.Tensor) -> torch.Tensor:
    """Allocate what a kernel writes row by row, even where `like` is a transposed tensor."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def num_experts_of(rows: LayerRows, step: StepTensors) -> int:
    """Return the row length of saliency and lit experts; 0 where neither is there."""
    for table in (rows.saliency, None if step.sums is None else step.sums.lit):
        if table is not None:
            return table.shape[1]
    return 0


def tokens_per_program(num_tokens: int, block_k: int, pairs: int = PAIRS_PER_PROGRAM) -> int:
    """Return a power of two of tokens whose `pairs` of slots fit one program."""
    fitting = max(1, pairs // block_k**2)
    return min(int(triton.next_power_of_2(num_tokens)), fitting)
