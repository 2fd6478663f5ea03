"""Bench, a decode step's time as a picture: `python -m moe_bench.step_figure steps.csv step.png`.

A bar per server and budget, from the kernels that `--profile` wrote, summed by what they are for.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from moe_bench.figure import draw
from moe_bench.results import STOCK
from moe_bench.step_profile import WHOLE_STEP

# What a kernel is for, by the first pattern that its name holds; the rest is the last.
PURPOSES = {
    "experts": r"fused_moe|act_and_mul|moe_align|count_and_sort|mul_sum",
    "router's choice": r"gatherTopK|softmax|triton_poi_fused__to_copy|_budgeted_routing",
    "drop and counts": r"_budgeted_slots|_union_slots|_token_|_step_statistics",
    "attention": r"_fwd_|rope",
    "the rest": r"",
}
COLOURS = ("#007c77", "#c8553d", "#d9a441", "#5b5f97", "#b9bcc0")


def purpose_of(kernel: str) -> str:
    """Return what a kernel is for."""
    return next(name for name, pattern in PURPOSES.items() if re.search(pattern, kernel))


def bars(rows: Sequence[dict[str, str]]) -> dict[str, dict[str, float]]:
    """Return milliseconds by purpose of each server at each budget, stock first."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in sorted(rows, key=lambda row: row["mode"] != STOCK):
        if row["kernel"] != WHOLE_STEP:
            server = "stock" if row["mode"] == STOCK else f"{row['mode']}\n{row['budget']}"
            found[server][purpose_of(row["kernel"])] += float(row["us"]) / 1e3
    return {server: dict(spent) for server, spent in found.items()}


def write_figure(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Draw the rows; a ValueError says that there are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = bars(rows)
    if not found:
        raise ValueError("no rows of kernels: run the bench with --kinds server --profile")
    figure, axis = pyplot.subplots(figsize=(1.6 + 0.95 * len(found), 3.8))
    places = range(len(found))
    below = [0.0] * len(found)
    for purpose, colour in zip(PURPOSES, COLOURS, strict=True):
        heights = [spent.get(purpose, 0.0) for spent in found.values()]
        axis.bar(places, heights, bottom=below, color=colour, label=purpose, width=0.7)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    for place, height in zip(places, below, strict=True):
        axis.text(place, height, f"{height:.2f}", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(places, list(found), fontsize=8)
    axis.set_ylabel("ms of kernels in a step")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    first = rows[0]
    title = f"Decode step, {first['requests']} requests, {first['shape']}, {first['device']}"
    axis.set_title(title, loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> int:
    """Draw what a CSV of step profiles has."""
    return draw(arguments, "moe_bench.step_figure steps.csv step.png", write_figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
