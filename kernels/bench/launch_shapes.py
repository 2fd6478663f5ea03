"""Find the launch that suits each rule: warps per program, with and without the step's sums.

    PYTHONPATH=.:kernels:kernels/bench python kernels/bench/launch_shapes.py >out/launch-shapes.csv

Each row times SGLang's routing and the drop behind it, as a captured CUDA graph. `warps_of` and
`token_warps` in the kernels were chosen by docs/results/gpu/launch-shapes.csv, which an earlier
form of this printed (without the bounds that requests may set).
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch

from moe_bench.budgets import make_rule
from moe_bench.engine import prepare_engine, stock_routing
from moe_bench.facts import machine_columns, require_gpu
from moe_bench.measure import HALF, dropped, step_as_served
from moe_bench.shapes import SHAPES, MoEShape, make_inputs
from moe_bench.timing import Timer
from sglang_alloc_kernels import budgeted_slots, token_slots, union_slots, union_tiles
from sglang_alloc_kernels.slot_rules import KERNELS

# Where each mode asks how many warps a program gets; `union` by the number of tokens.
ASKED: dict[str, tuple[tuple[ModuleType, ...], str]] = {
    "layer": ((budgeted_slots,), "warps_of"),
    "threshold": ((budgeted_slots,), "warps_of"),
    "union": ((union_slots, union_tiles), "warps_of"),
    "token": ((token_slots,), "token_warps"),
}
TOKENS, WARPS = (8, 64, 512), (1, 2, 4, 8, 16)


def rows(shape: MoEShape, num_tokens: int, timer: Timer) -> Iterator[dict[str, object]]:
    """Yield a row for stock SGLang, then for each mode and number of warps."""
    device = torch.device("cuda")
    route = stock_routing(shape, make_inputs(shape, num_tokens, device, torch.bfloat16))
    slots = tuple(part.clone() for part in route())
    names = {"shape": shape.name, "num_tokens": num_tokens}
    yield names | {"mode": "-", "median_us": 1e6 * timer.seconds(route).median}
    plain = step_as_served(shape, num_tokens, device, counted=False)
    counted = step_as_served(shape, num_tokens, device, counted=True)
    for mode, (modules, name) in ASKED.items():
        rule = make_rule(shape, mode, HALF, (slots[0], slots[1]), KERNELS)
        chosen = getattr(modules[0], name)
        try:
            for warps in WARPS:
                for module in modules:
                    setattr(module, name, lambda _size, warps=warps: warps)
                for sums, step in (("no", plain), ("yes", counted)):
                    timing = timer.seconds(partial(dropped, rule, route, step))
                    launch = {"mode": mode, "warps": warps, "sums": sums}
                    yield names | launch | {"median_us": 1e6 * timing.median}
        finally:
            for module in modules:
                setattr(module, name, chosen)


def main() -> None:
    """Print the CSV."""
    require_gpu(serves=False)
    device = torch.device("cuda")
    prepare_engine(device)
    machine = machine_columns(device)
    fields = ["shape", "num_tokens", "mode", "warps", "sums", "median_us", *machine]
    writer = csv.DictWriter(sys.stdout, fields)
    writer.writeheader()
    timer = Timer(device, repeats=9, window_seconds=0.004)
    for shape in SHAPES:
        for num_tokens in TOKENS:
            for row in rows(shape, num_tokens, timer):
                writer.writerow(row | machine)
                sys.stdout.flush()


if __name__ == "__main__":
    main()
