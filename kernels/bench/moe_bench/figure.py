"""Bench, what a budget gains as a picture: `python -m moe_bench.figure moe-cuda.csv layers.png`.

Speedup of a MoE layer over stock SGLang against the budget, a panel per kind of batch; dashed is
what the distinct experts that were measured allow in decode.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_bench.budgets import FRACTIONS
from moe_bench.measure import DROPPED, FUSED

# By kind and variant.
PANELS = {
    ("layer", DROPPED): "decode",
    ("layer", FUSED): "decode, routed by our kernel",
    ("prefill", DROPPED): "prefill",
}
MODE = "layer"
COLOURS = ("#007c77", "#c8553d", "#8a8d91", "#5b5f97", "#d9a441")


def write_figure(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Draw the first shape's layers in mode `layer`; a ValueError says that there are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = [row for row in rows if _panel(row) in PANELS and row["mode"] == MODE]
    if not layers:
        raise ValueError(f"no rows of layers in mode {MODE}: run the bench with --kinds layer")
    shape, device = layers[0]["shape"], layers[0]["device"]
    chosen = [row for row in layers if row["shape"] == shape]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(12, 3.6), sharey=True)
    for axis, (panel, title) in zip(axes, PANELS.items(), strict=True):
        _draw(axis, [row for row in chosen if _panel(row) == panel], allowed=panel[0] == "layer")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("share of the full budget")
        axis.axhline(1.0, color="#d0d3d6", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("speedup over stock")
    figure.suptitle(f"MoE layer of {shape}, mode {MODE}, {device}", x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _panel(row: dict[str, str]) -> tuple[str | None, str | None]:
    return row.get("kind"), row.get("variant")


def _draw(axis: Any, rows: Sequence[dict[str, str]], *, allowed: bool) -> None:
    sizes = sorted({int(row["num_tokens"]) for row in rows})
    for size, colour in zip(sizes, COLOURS, strict=False):
        line = [row for row in rows if int(row["num_tokens"]) == size]
        shares = [FRACTIONS[row["budget"]] for row in line]
        axis.plot(shares, [float(row["speedup"]) for row in line], "o-", color=colour, ms=3.5)
        if allowed:
            bounds = [float(row["roofline_speedup"]) for row in line]
            axis.plot(shares, bounds, "--", color=colour, linewidth=0.9, alpha=0.6)
        label = "1 token" if size == 1 else f"{size} tokens"
        axis.plot([], [], "o-", color=colour, ms=3.5, label=label)
    axis.set_xticks(list(FRACTIONS.values()), list(FRACTIONS))
    axis.invert_xaxis()
    axis.legend(frameon=False, fontsize=8)


def draw(
    arguments: Sequence[str],
    usage: str,
    write: Callable[[Sequence[dict[str, str]], Path], None],
) -> int:
    """Draw what a CSV has by `write`; return the exit status.

    arguments: the CSV and the picture.
    """
    if len(arguments) != 2:
        print(f"usage: python -m {usage}", file=sys.stderr)
        return 2
    source, target = (Path(argument) for argument in arguments)
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        write(rows, target)
    except ValueError as error:
        print(f"{source}: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str]) -> int:
    """Draw what a CSV of the bench has of layers."""
    return draw(arguments, "moe_bench.figure moe-cuda.csv layers.png", write_figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
