"""Bench, served steps as the controller reads them: `python -m moe_bench.latency IN.csv OUT.csv`.

`sglang-alloc-controller simulate --bench` and `advise` take the CSV. It has the rows of one shape's
servers, those that SGLang routes or those that our kernel does, with budgets in activations per
token over all MoE layers.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_bench.budgets import MODES
from moe_bench.results import STOCK
from moe_bench.server_bench import FUSED, SERVED_FRACTIONS
from moe_bench.shapes import SHAPES, SMALL, MoEShape

KINDS = {"server decode": "decode", "server prefill": "prefill"}
FIELDS = (
    *("phase", "mode", "concurrency", "prefill_prompt_tokens", "budget"),
    *("median_ms", "stock_median_ms", "ratio_to_stock"),
)


def latency_rows(
    rows: Sequence[dict[str, str]], shape: MoEShape, *, fused: bool
) -> Iterator[dict[str, object]]:
    """Yield a row of `FIELDS` for each mode, case and budget of a shape's servers."""
    full = shape.num_layers * shape.top_k
    for row in rows:
        phase = KINDS.get(row["kind"])
        if phase is None or row["shape"] != shape.name or row["mode"] == STOCK:
            continue
        if row["mode"].endswith(FUSED) != fused:
            continue
        fraction = SERVED_FRACTIONS[row["budget"]]
        yield {
            "phase": phase,
            "mode": row["mode"].removesuffix(FUSED),
            "concurrency": row["num_tokens"],
            "prefill_prompt_tokens": 1,
            "budget": max(round(fraction * full), shape.num_layers),
            "median_ms": f"{float(row['median_us']) / 1e3:.4f}",
            "stock_median_ms": f"{float(row['stock_us']) / 1e3:.4f}",
            "ratio_to_stock": f"{float(row['median_us']) / float(row['stock_us']):.4f}",
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert a CSV; return 1 where it holds no server's rows of the shape."""
    parser = argparse.ArgumentParser(prog="moe_bench.latency", description=__doc__)
    shapes = {shape.name: shape for shape in (*SHAPES, SMALL)}
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--shape", default=SHAPES[0].name, choices=tuple(shapes))
    parser.add_argument("--mode", choices=MODES, help="only this one's rows")
    parser.add_argument("--fused", action="store_true", help="of servers that our kernel routes")
    given = parser.parse_args(arguments)
    with given.source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = list(latency_rows(rows, shapes[given.shape], fused=given.fused))
    found = [row for row in found if given.mode in {None, row["mode"]}]
    if not found:
        print(
            f"{given.source} has no rows of servers of {given.shape} in "
            f"{'any mode' if given.mode is None else f'mode {given.mode}'}, "
            f"{'routed by our kernel' if given.fused else 'routed by SGLang'}: run the bench with "
            "--kinds server",
            file=sys.stderr,
        )
        return 1
    with given.target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
