"""Run SGLang's Triton experts with slots dropped: `TRITON_INTERPRET=1 python triton_experts.py`.

Prints one JSON object: the largest error beside a plain computation, and the largest output. The
weights of every expert that no kept slot asks for are NaN, so that one read would show. The
interpreter must be on before SGLang defines its kernels, so the tests start this as a process; on a
GPU (KERNEL_TEST_DEVICE=cuda) they run compiled.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch.nn import functional

from moe_bench.engine import prepare_engine, triton_experts
from moe_bench.shapes import ExpertWeights

DEVICE = os.environ.get("KERNEL_TEST_DEVICE", "cpu")
BLOCK = 16
CONFIG = {"BLOCK_SIZE_M": BLOCK, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 16, "GROUP_SIZE_M": 1}
TOKENS, TOP_K, EXPERTS, HIDDEN, INTERMEDIATE = 5, 3, 6, 32, 16


def aligned_blocks(
    topk_ids: torch.Tensor, block_size: int, num_experts: int, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what SGLang's CUDA kernel of alignment does: slots by expert, -1 first, padded blocks."""
    flat = topk_ids.flatten()
    slots: list[int] = []
    experts: list[int] = []
    for expert in range(-1, num_experts):
        mine = (flat == expert).nonzero().flatten().tolist()
        mine += [len(flat)] * (-len(mine) % block_size)
        slots += mine
        experts += [expert] * (len(mine) // block_size)
    as_int = [torch.tensor(values, dtype=torch.int32) for values in (slots, experts, [len(slots)])]
    return as_int[0], as_int[1], as_int[2]


def plain_experts(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Compute the mixture of the kept slots one by one."""
    output = torch.zeros_like(x)
    for token, slot in (ids >= 0).nonzero().tolist():
        expert = int(ids[token, slot])
        gate, up = (w13[expert] @ x[token]).chunk(2)
        output[token] += weights[token, slot] * (w2[expert] @ (functional.silu(gate) * up))
    return output


def main() -> None:
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe, override_config

    prepare_engine(torch.device(DEVICE))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / 6
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / 4
    weights, ids = torch.rand(TOKENS, EXPERTS, generator=generator).softmax(dim=1).topk(TOP_K)
    ids = ids.int()
    ids[ids == 2] = -1  # an expert that nobody keeps
    ids[0, 1] = -1  # one slot of a token whose others stay
    ids[4] = -1  # a row of padding
    weights = weights.masked_fill(ids < 0, 0.0)
    for expert in set(range(EXPERTS)) - set(ids.flatten().tolist()):
        w13[expert], w2[expert] = float("nan"), float("nan")
    expected = plain_experts(x, w13, w2, weights, ids)
    if DEVICE == "cpu":
        fused_moe.moe_align_block_size = aligned_blocks  # SGLang's is a CUDA kernel
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    run = triton_experts(ExpertWeights(w13.to(DEVICE, dtype), w2.to(DEVICE, dtype)))
    with override_config(CONFIG):
        output = run(x.to(DEVICE, dtype), weights.to(DEVICE), ids.to(DEVICE), True)
    found = output.float().cpu()
    error, size = (float(part.abs().max()) for part in (found - expected, found))
    print(json.dumps({"error": error, "size": size, "padding": float(found[4].abs().max())}))


if __name__ == "__main__":
    main()
