"""Run SGLang's Triton experts with slots dropped: `TRITON_INTERPRET=1 python triton_experts.py`.

Prints one JSON object: the largest error beside a plain computation, and the largest output. The
weights of every expert that no kept slot asks for are NaN, and so is memory that nobody wrote, so
that one read would show. With `fp8` as an argument, weights and activations are FP8, the latter by
one scale for all rows. The interpreter must be on before SGLang defines its kernels, so the tests
start this as a process; on a GPU (KERNEL_TEST_DEVICE=cuda) they run compiled.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch.nn import functional

from moe_bench.engine import prepare_engine, triton_experts
from moe_bench.shapes import ExpertWeights

DEVICE = os.environ.get("KERNEL_TEST_DEVICE", "cpu")
BLOCK = 16
CONFIG = {"BLOCK_SIZE_M": BLOCK, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1}
TOKENS, TOP_K, EXPERTS, HIDDEN, INTERMEDIATE = 5, 3, 6, 32, 32
LARGEST_FP8 = 448.0


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


def quantised(
    x: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return FP8 numbers and the one scale that they were divided by."""
    if scale is None:
        scale = (x.abs().max() / LARGEST_FP8).float().reshape(1)
    return (x / scale).to(torch.float8_e4m3fn), scale


def quantised_on_cpu(x: torch.Tensor, scale: torch.Tensor | None, **_: Any) -> Any:
    """Do what SGLang's CUDA kernel of quantisation does, in numbers that the interpreter adds."""
    numbers, scale = quantised(x, scale)
    return numbers.float(), scale


def filtered_silu(x: torch.Tensor, out: torch.Tensor, **row_filter: Any) -> None:
    """Do what SGLang's CUDA kernel of activation does: leave filtered rows as they were."""
    gate, up = x.chunk(2, dim=-1)
    rows = torch.ones(len(x), dtype=torch.bool)
    if row_filter:
        assert row_filter["expert_step"] == 1
        rows = row_filter["expert_ids"] >= 0
    out[rows] = (functional.silu(gate) * up)[rows]


def stand_in_for_cuda(fused_moe: Any, kernels: Any) -> None:
    """Let SGLang take its way of a GPU, with plain code where that calls kernels of CUDA."""
    fused_moe.moe_align_block_size = aligned_blocks
    fused_moe._is_cuda = True
    fused_moe.silu_and_mul = filtered_silu
    fused_moe.moe_combine_topk = lambda intermediate_cache3, out_hidden_states, **_: (
        out_hidden_states.copy_(intermediate_cache3.sum(dim=1))
    )
    kernels.scaled_fp8_quant = quantised_on_cpu


def run_fp8(
    fused_moe: Any, slots: tuple[torch.Tensor, ...], w13: torch.Tensor, w2: torch.Tensor
) -> Any:
    """Run the experts in FP8 with one scale an expert, and one found while running for all rows."""
    scaled = [[quantised(expert) for expert in weights] for weights in (w13, w2)]
    dtype = torch.float32 if DEVICE == "cpu" else torch.float8_e4m3fn
    numbers = [torch.stack([number for number, _ in of]).to(DEVICE, dtype) for of in scaled]
    scales = [torch.cat([scale for _, scale in of]).to(DEVICE) for of in scaled]
    return fused_moe.fused_experts_impl(
        *(slots[0], *numbers, *slots[1:]),
        inplace=True,
        use_fp8_w8a8=True,
        w1_scale=scales[0],
        w2_scale=scales[1],
        filter_expert=True,
    )


def main() -> None:
    from sglang.kernels.ops.moe import fused_moe_triton_kernels
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe, override_config

    # From now on memory that nobody has written is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
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
        stand_in_for_cuda(fused_moe, fused_moe_triton_kernels)
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    run = triton_experts(ExpertWeights(w13.to(DEVICE, dtype), w2.to(DEVICE, dtype)))
    slots = (x.to(DEVICE, dtype), weights.to(DEVICE), ids.to(DEVICE))
    with override_config(CONFIG):
        output = run_fp8(fused_moe, slots, w13, w2) if "fp8" in sys.argv else run(*slots, True)
    found = output.float().cpu()
    error, size = (float(part.abs().max()) for part in (found - expected, found))
    print(json.dumps({"error": error, "size": size, "padding": float(found[4].abs().max())}))


if __name__ == "__main__":
    main()
