"""Offline story, judging: what lm-evaluation-harness wrote, one line for each budget and metric."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.atomic_file import replace_file
from sglang_alloc.evaluation.harness import HarnessError, Measured

COLUMNS = (
    *("budget", "prefill_activations", "decode_activations"),
    *("task", "filter", "metric", "value", "standard_error"),
)


class Score(NamedTuple):
    """One metric of one task, as lm_eval reports it."""

    task: str
    filter: str
    metric: str
    value: float
    standard_error: float | None


def read_scores(folder: Path) -> list[Score]:
    """Read the newest results that lm_eval left in `folder`.

    Raises:
        HarnessError: there are none, or they are not lm_eval's.
    """
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        raise HarnessError(f"lm_eval left no results_*.json in {folder}.")
    try:
        tasks = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
        return [score for task, found in tasks.items() for score in _scores_of(task, found)]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise HarnessError(f"{files[-1]} is no result of lm_eval: {error!r}.") from error


def _scores_of(task: str, found: dict[str, object]) -> list[Score]:
    """Metrics are named "acc,none", their standard errors "acc_stderr,none"."""
    scores = []
    for name, value in found.items():
        metric, comma, chosen = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{chosen}")
        number = float(error) if isinstance(error, int | float) else None
        scores.append(Score(task, chosen, metric, float(value), number))
    return scores


def write_scores(path: Path, runs: Sequence[tuple[int, Measured, Sequence[Score]]]) -> None:
    """Write the runs' scores as CSV, in one step.

    Raises:
        HarnessError: the file cannot be written.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for budget, measured, scores in runs:
        for score in scores:
            lines.writerow([budget, *map(_rounded, measured), *score[:3], *map(_exact, score[3:])])
    try:
        replace_file(path, text.getvalue().encode(), mode=0o644)
    except OSError as error:
        raise HarnessError(f"Cannot write {path}: {error.strerror}.") from error


def summary(budget: int, measured: Measured, scores: Sequence[Score]) -> str:
    """Return one line for people."""
    kept = ", ".join(
        f"{phase} {value:.2f}" for phase, value in measured._asdict().items() if value is not None
    )
    found = "; ".join(
        f"{score.task} {score.metric} {score.value:.4f}"
        + ("" if score.standard_error is None else f" ± {score.standard_error:.4f}")
        for score in scores
    )
    return f"budget {budget} ({kept or 'not measured'} activations per token): {found}"


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _exact(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
