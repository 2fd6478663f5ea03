"""Offline story, judging: all points of the grid as one CSV, with confidence intervals."""

import csv
import io

import numpy as np

from sglang_alloc.evaluation.findings import FULL_RULE, losses_above_full
from sglang_alloc.evaluation.intervals import Interval, mean_interval
from sglang_alloc.evaluation.points import Point, Points
from sglang_alloc.evaluation.text_measures import BATCH_SIZES


def summary_text(model: str, points: Points) -> str:
    """One row per point: use, then mean, low and high of each measure.

    `nll_above_full` is in nats per token; the others are `kl` in nats per token, and shares.
    """
    full = next(p for p in points.values() if p.rule == FULL_RULE)
    measures = ["nll_above_full", *(name for name in full.samples if name != "nll")]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([
        "model", "rule", "budget", "mean_k",
        *(f"distinct_experts_at_{size}" for size in BATCH_SIZES),
        *(f"{measure}{end}" for measure in measures for end in ("", "_low", "_high")),
    ])  # fmt: skip
    for point in points.values():
        rows.writerow([model, point.rule, point.budget, *_cells(points, point, measures)])
    return text.getvalue()


def _cells(points: Points, point: Point, measures: list[str]) -> list[str]:
    used = [point.mean_k, *(point.distinct_experts.get(size) for size in BATCH_SIZES)]
    cells = ["" if value is None else f"{value:.4f}" for value in used]
    for measure in measures:
        interval = measure_interval(points, point, measure)
        cells += ["", "", ""] if interval is None else [f"{value:.5f}" for value in interval]
    return cells


def measure_interval(points: Points, point: Point, measure: str) -> Interval | None:
    """Mean and bounds of a measure of a point; None where it was not measured."""
    if measure == "nll_above_full":
        return mean_interval(losses_above_full(points, point)) if "nll" in point.samples else None
    samples = point.samples.get(measure)
    return None if samples is None else mean_interval(np.array(samples))
