"""Compile every kernel for a GPU that is not there: `python compile_for_gpu.py` prints a line each.

Host functions are called as they are; a launch compiles instead of running. Needs no driver: Triton
brings its assembler. The interpreter must be off, so the tests start this as a process of its own.
With `--resources` a line also tells registers and instructions, which takes longer.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import sglang_alloc_kernels.budgeted_routing
import sglang_alloc_kernels.budgeted_slots
from sglang_alloc_kernels.budgeted_routing import Router, budgeted_routing
from sglang_alloc_kernels.budgeted_slots import budgeted_slots
from sglang_alloc_kernels.layer_rows import LayerRows, StepTensors
from sglang_alloc_kernels.step_statistics import make_step_sums, make_totals, step_statistics
from sglang_alloc_kernels.token_slots import token_slots
from sglang_alloc_kernels.union_routing import union_routing
from sglang_alloc_kernels.union_slots import union_slots

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
LAYERS, EXPERTS, TOP_K = 2, 60, 6
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_launch(
    kernel: Any, target: GPUTarget, args: tuple[Any, ...], named: Any, seen: set[str]
) -> Any:
    """Compile what `kernel[grid](*args, **named)` would have launched; None if that was `seen`."""
    options = {key: named.pop(key) for key in ("num_warps", "launch_pdl") if key in named}
    bound = inspect.signature(kernel.fn).bind(*args, **named).arguments
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature: dict[str, str] = {}
    for name, value in bound.items():
        if name in constant or value is None:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    constants = {name: bound[name] for name, kind in signature.items() if kind == "constexpr"}
    key = repr((kernel.__name__, signature, constants, options))
    if key in seen:
        return None
    seen.add(key)
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), target=target, options=options
    )
    require_sound(kernel.__name__, compiled.asm["ttgir"], compiled.asm["ptx"], options)
    return compiled


def require_sound(name: str, ttgir: str, ptx: str, options: dict[str, Any]) -> None:
    """Raise AssertionError for what went wrong on a GPU once, or would."""
    sources = dict(re.findall(r"(%\S+) = ttg\.convert_layout (%\S+) ", ttgir))
    for operands in re.findall(r"tt\.histogram (%\S+), (%\S+) ", ttgir):
        for operand in operands:
            reshaped = sources.get(operand, operand)
            if re.search(rf"{reshaped} = tt\.reshape .*allow_reorder", ttgir):
                # Triton permutes the elements of ids and mask, and of each in its own way.
                raise AssertionError(f"{name}: {operand} of a masked histogram may be permuted")
    if "histogram" in ttgir and not re.search(r"tt\.histogram %\S+, %\S+ ", ttgir):
        raise AssertionError(f"{name}: Triton prints histograms otherwise now; mend this check")
    if options.get("launch_pdl"):
        before_wait = ptx.partition("griddepcontrol.wait")[0]
        if before_wait == ptx or re.search(r"\b(ld|st|atom|red)\.global", before_wait):
            raise AssertionError(f"{name} is launched early and does not wait before its memory")


def resources(cubin: bytes) -> str:
    """Return the registers of a thread and the instructions of the code, as NVIDIA's tools tell."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [str(NVIDIA_TOOLS / tool), option, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    instructions = [
        line for line in re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*);", code) if line != "NOP"
    ]
    registers = re.findall(r"REG:(\d+)", usage)
    return f", {registers[0]} registers, {len(instructions)} instructions"


def launches(target: GPUTarget, *, with_resources: bool) -> Iterator[str]:
    """Call every host function; yield one line per kernel that was compiled."""
    lines: list[str] = []
    seen: set[str] = set()

    def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        warps = named.get("num_warps", 4)
        compiled = compile_launch(kernel, target, args, named, seen)
        if compiled is not None:
            cubin, shared = compiled.asm["cubin"], compiled.metadata.shared
            line = (
                f"{kernel.__name__}: {len(cubin)} bytes, {shared} of shared memory, {warps} warps"
            )
            lines.append(line + (resources(cubin) if with_resources else ""))

    JITFunction.run = compile_instead
    rows = LayerRows(*(torch.ones(LAYERS) for _ in range(3)), torch.ones(LAYERS, EXPERTS))
    bare = LayerRows(torch.ones(LAYERS))
    for tokens in (33, 1024):
        bounds = torch.ones(tokens, dtype=torch.int32)
        sums = make_step_sums(LAYERS, EXPERTS, "cpu")
        step = StepTensors(torch.ones(1, dtype=torch.int32), bounds, bounds, sums)
        weights = torch.ones(tokens, TOP_K + 2)
        ids = torch.ones(tokens, TOP_K + 2, dtype=torch.int32)
        # In service the step is always whole; corrections are in some tables.
        for now in (rows, bare):
            for early in (False, True):
                sglang_alloc_kernels.budgeted_slots.launches_early = lambda _, early=early: early
                budgeted_slots(weights, ids, now, 1, "quota", num_shared=2, step=step)
                budgeted_slots(weights, ids, now, 1, "threshold", num_shared=2, step=step)
            token_slots(weights, ids, now, 1, num_shared=2, step=step)
            union_slots(weights, ids, now, 1, EXPERTS, num_shared=2, step=step)
        union_slots(weights, ids, rows, 1, EXPERTS, "threshold", num_shared=2, step=step)
        yield from lines
        lines.clear()
    capped = rows._replace(caps=torch.ones(LAYERS))
    union_slots(weights[:33], ids[:33], capped, 1, EXPERTS, num_shared=2, step=step)
    # As the bench times routing, and as a router may return slots.
    valid = StepTensors(step.num_valid_tokens)
    budgeted_slots(weights[:1], ids[:1], bare, 1, "quota", step=valid)
    token_slots(weights[:1], ids[:1], bare, 1, step=valid)
    budgeted_slots(weights[:16].bfloat16(), ids[:16].long(), bare, 1, "quota", step=step)
    step_statistics(sums, make_totals(LAYERS, "cpu"))
    by_phase = torch.stack([make_totals(LAYERS, "cpu")] * 2)
    step_statistics(sums, by_phase, torch.zeros(1, dtype=torch.int32))
    logits = torch.ones(3, EXPERTS, dtype=torch.bfloat16)
    bias = torch.ones(EXPERTS)
    grouped = Router(TOP_K, "sigmoid", num_groups=6, top_groups=2, scaling=2.5)
    for early in (False, True):
        sglang_alloc_kernels.budgeted_routing.launches_early = lambda _, early=early: early
        budgeted_routing(logits, Router(TOP_K), bare, 1, "quota")
        budgeted_routing(logits, grouped, rows, 1, "threshold", correction_bias=bias, step=step)
        # As service routes from float32 logits.
        budgeted_routing(logits.float(), Router(TOP_K), rows, 1, "threshold", step=step)
    union_routing(logits, Router(TOP_K), rows, 1)
    yield from lines


def main() -> None:
    for line in launches(GPUTarget("cuda", 90, 32), with_resources="--resources" in sys.argv):
        print(line)


if __name__ == "__main__":
    main()
