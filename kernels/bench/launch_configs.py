"""Find launch configurations of SGLang's Triton experts that suit full and reduced budgets.

    PYTHONPATH=.:kernels:kernels/bench python kernels/bench/launch_configs.py --out out/configs

SGLang looks for a JSON file per shape and GPU below `SGLANG_MOE_CONFIG_DIR` and falls back to one
default for all. A reduced budget leaves fewer experts to read, so a launch is judged here by the
full budget and by half of it: its score is the mean of its times over the best launch's times. The
file and a CSV of all timings are written to the folder. Launches are compiled by several processes
first.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_bench.budgets import Budget, make_rule
from moe_bench.engine import prepare_engine, stock_routing, triton_experts
from moe_bench.facts import machine_columns, require_gpu
from moe_bench.measure import step_as_served
from moe_bench.shapes import SHAPES, MoEShape, make_experts, make_inputs
from moe_bench.timing import Timer
from sglang_alloc_kernels.slot_rules import KERNELS

TOKENS = (1, 2, 4, 8, 16, 32, 64)
BUDGETS = {"full": Budget(1.0), "1/2": Budget(0.5)}
SHARED_MEMORY_BYTES = 227 * 1024  # of a Hopper multiprocessor, as much as a program may have
# SGLang's own for bfloat16, of small batches and of large ones.
DEFAULT = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
LARGE_DEFAULT = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8}

Config = dict[str, int]


def candidates() -> list[Config]:
    """Return SGLang's default for small batches, then the launches tried in its place."""
    tried = [dict(DEFAULT)]
    for block_n in (32, 64, 128):
        for block_k in (64, 128, 256):
            for stages in (2, 3, 4, 5):
                for warps in (4, 8):
                    used = 2 * stages * block_k * (16 + block_n)
                    if used > SHARED_MEMORY_BYTES or (warps == 8 and block_n < 128):
                        continue
                    sizes = {"BLOCK_SIZE_N": block_n, "BLOCK_SIZE_K": block_k}
                    tried.append(DEFAULT | sizes | {"num_warps": warps, "num_stages": stages})
    return tried


def rows(
    shape: MoEShape, num_tokens: int, configs: Sequence[Config], timer: Timer | None
) -> Iterator[dict[str, Any]]:
    """Yield the time of the experts under each launch and budget; without a timer, run each once.

    Experts get the same slots as in service: what a budget drops is skipped.
    """
    from sglang.srt.layers.moe.moe_runner.triton_utils import override_config

    device = torch.device("cuda")
    inputs = make_inputs(shape, num_tokens, device, torch.bfloat16)
    weights, ids = (part.clone() for part in stock_routing(shape, inputs)())
    step = step_as_served(shape, num_tokens, device, counted=False)
    experts = triton_experts(make_experts(shape, device, torch.bfloat16))
    for budget, share in BUDGETS.items():
        slots = make_rule(shape, "layer", share, (weights, ids), KERNELS).drop(weights, ids, step)
        for index, config in enumerate(configs):
            call = partial(experts, inputs.hidden_states.clone(), *slots, True)
            with override_config(config):
                if timer is None:
                    call()
                    continue
                timing = timer.seconds(call)
            names = {"shape": shape.name, "num_tokens": num_tokens, "budget": budget}
            yield names | {"config": index, **config, "us": 1e6 * timing.median}


def best_configs(timed: Sequence[dict[str, Any]], configs: Sequence[Config]) -> dict[int, Config]:
    """Return the launch of the best score for each number of tokens."""
    chosen = {}
    for num_tokens in sorted({int(row["num_tokens"]) for row in timed}):
        scores = dict.fromkeys(range(len(configs)), 0.0)
        for budget in BUDGETS:
            times = {
                int(row["config"]): float(row["us"])
                for row in timed
                if (int(row["num_tokens"]), row["budget"]) == (num_tokens, budget)
            }
            least = min(times.values())
            for index in scores:
                scores[index] += times.get(index, math.inf) / least / len(BUDGETS)
        chosen[num_tokens] = configs[min(scores, key=lambda index: scores[index])]
    return chosen


def compile_all(shape: MoEShape, tokens: Sequence[int], processes: int) -> None:
    """Fill Triton's cache, so that timing waits for no compiler."""
    command = [sys.executable, __file__, "--shape", shape.name, "--tokens", *map(str, tokens)]
    running = [
        subprocess.Popen([*command, "--compile-part", str(part), str(processes)])
        for part in range(processes)
    ]
    ended = [process.wait() for process in running]
    if any(ended):
        raise SystemExit("a launch could not be compiled: see above")


def config_path(folder: Path, shape: MoEShape) -> Path:
    """Return where SGLang looks for the file of this shape under `SGLANG_MOE_CONFIG_DIR`."""
    import triton
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config import (
        get_config_file_name,
    )

    version = f"triton_{triton.__version__.replace('.', '_')}"
    name = get_config_file_name(shape.num_experts, shape.intermediate_size, None)
    return folder / "configs" / version / name


def main() -> None:
    """Time all launches; write the CSV and SGLang's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default=SHAPES[0].name, choices=[one.name for one in SHAPES])
    parser.add_argument("--out", type=Path, default=Path("out/configs"))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--compile-part", nargs=2, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    require_gpu(serves=False)
    prepare_engine(torch.device("cuda"))
    (shape,) = (one for one in SHAPES if one.name == given.shape)
    configs = candidates()
    if given.compile_part:
        part, parts = given.compile_part
        for tokens in given.tokens:
            list(rows(shape, tokens, configs[part::parts], None))
        return
    compile_all(shape, given.tokens, given.processes)
    timer = Timer(torch.device("cuda"), repeats=7, window_seconds=0.003)
    timed = [row for tokens in given.tokens for row in rows(shape, tokens, configs, timer)]
    given.out.mkdir(parents=True, exist_ok=True)
    machine = machine_columns(torch.device("cuda"))
    with (given.out / f"{shape.name}.csv").open("w", encoding="utf-8", newline="") as file:
        fields = ["shape", "num_tokens", "budget", "config", *DEFAULT, "num_warps", "num_stages"]
        writer = csv.DictWriter(file, [*fields, "us", *machine])
        writer.writeheader()
        writer.writerows(row | {"us": f"{row['us']:.2f}"} | machine for row in timed)
    path = config_path(given.out, shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = best_configs(timed, configs)
    # SGLang takes the nearest size: its own default for what is larger than what was timed.
    chosen[2 * max(chosen)] = LARGE_DEFAULT
    path.write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")
    print(f"{path}: start SGLang with SGLANG_MOE_CONFIG_DIR={given.out.resolve()}")


if __name__ == "__main__":
    main()
