"""Simulator, the command: scores become results.csv and the table of a summary, as text."""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from sglang_alloc_controller.simulator.cells import Finished
from sglang_alloc_controller.simulator.law_names import ORACLE, OURS, RIVALS
from sglang_alloc_controller.simulator.scenarios import named
from sglang_alloc_controller.simulator.scores import Score

COLUMNS = (
    "scenario",
    "law",
    "seed",
    "slo_attainment_ratio",
    "mean_predicted_loss",
    "seconds_below_full",
    "changes_per_hour",
    "goodput_per_second",
    "worst_minute_ratio",
    "overshoot_loss",
    "settling_seconds",
    "feasible",
)
# The bar: attainment within this of the oracle's, predicted loss at most this multiple of its.
ATTAINMENT_GAP, LOSS_FACTOR = 0.01, 1.25
# Differences smaller than these are none: a tenth of a point, and a loss that nobody could measure.
_SAME_ATTAINMENT, _SAME_LOSS = 0.001, 1e-4


class Mean(NamedTuple):
    """A law's mean over the seeds of a scenario."""

    attainment_ratio: float
    loss: float
    changes_per_hour: float


class Verdict(NamedTuple):
    """How ours did on one scenario."""

    scenario: str
    feasible: bool
    means: dict[str, Mean]
    attainment_kept: bool | None
    """None: the oracle was not run."""
    loss_kept: bool | None
    beaten_by: tuple[str, ...]
    """Rivals with a better attainment at equal or less loss."""


def results_csv(finished: Iterable[Finished]) -> str:
    """Return results.csv; what does not exist (no disturbance) is an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for (scenario, law, seed, _), score, _timeline in finished:
        numbers = (_number(getattr(score, name)) for name in COLUMNS[3:-1])
        feasible = str(named(scenario).feasible).lower()
        writer.writerow((scenario, law, seed, *numbers, feasible))
    return out.getvalue()


def gains_csv(finished: Iterable[Finished]) -> str:
    """Return how calm our law is under constant load on plants that differ from their bench."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ("scenario", "gain", "seed", "changes_per_hour", "slo_attainment_ratio",
         "mean_predicted_loss")
    )  # fmt: skip
    for (scenario, law, seed, gain), score, _timeline in finished:
        if law == OURS and named(scenario).constant:
            numbers = (
                score.changes_per_hour,
                score.slo_attainment_ratio,
                score.mean_predicted_loss,
            )
            writer.writerow((scenario, f"{gain:g}", seed, *(_number(one) for one in numbers)))
    return out.getvalue()


def verdicts(finished: Sequence[Finished]) -> list[Verdict]:
    """Judge ours against the oracle and the rivals, on each scenario that it was run on."""
    scores: dict[str, dict[str, list[Score]]] = defaultdict(lambda: defaultdict(list))
    for cell, score, _ in finished:
        scores[cell.scenario][cell.law].append(score)
    return [
        _verdict(scenario, {law: _mean(some) for law, some in laws.items()})
        for scenario, laws in scores.items()
        if OURS in laws
    ]


def summary_markdown(found: Sequence[Verdict]) -> str:
    """Return a table of the verdicts; attainment in per cent, loss in thousandths of a nat."""
    lines = [
        "| scenario | ours | oracle | full | best rival at no more loss | bar |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        rival = _best_rival(one)
        cells = [_cell(one.means.get(law)) for law in (OURS, ORACLE, "full")]
        rival_cell = f"{rival}: {_cell(one.means[rival])}" if rival else "none"
        lines.append(f"| {one.scenario} | {' | '.join(cells)} | {rival_cell} | {_bar(one)} |")
    return "\n".join(lines) + "\n"


def _verdict(scenario: str, means: dict[str, Mean]) -> Verdict:
    ours, oracle = means[OURS], means.get(ORACLE)
    beaten_by = tuple(
        law
        for law in RIVALS
        if law in means
        and means[law].loss <= ours.loss + _SAME_LOSS
        and means[law].attainment_ratio > ours.attainment_ratio + _SAME_ATTAINMENT
    )
    attainment_kept = loss_kept = None
    if oracle is not None:
        attainment_kept = ours.attainment_ratio >= oracle.attainment_ratio - ATTAINMENT_GAP
        loss_kept = ours.loss <= LOSS_FACTOR * oracle.loss + _SAME_LOSS
    return Verdict(scenario, named(scenario).feasible, means, attainment_kept, loss_kept, beaten_by)


def _best_rival(found: Verdict) -> str | None:
    """Return the rival of the best attainment among those that lose no more than ours."""
    limit = found.means[OURS].loss + _SAME_LOSS
    cheap = [law for law in RIVALS if law in found.means and found.means[law].loss <= limit]
    return max(cheap, key=lambda law: found.means[law].attainment_ratio, default=None)


def _bar(found: Verdict) -> str:
    if not found.feasible:
        return "infeasible: not judged"
    missed = []
    if found.attainment_kept is False:
        missed.append("attainment")
    if found.loss_kept is False:
        missed.append("loss")
    if found.beaten_by:
        missed.append("beaten by " + ", ".join(found.beaten_by))
    return "missed: " + "; ".join(missed) if missed else "kept"


def _mean(scores: Sequence[Score]) -> Mean:
    return Mean(
        fmean(one.slo_attainment_ratio for one in scores),
        fmean(one.mean_predicted_loss for one in scores),
        fmean(one.changes_per_hour for one in scores),
    )


def _cell(mean: Mean | None) -> str:
    if mean is None:
        return "not run"
    return f"{100 * mean.attainment_ratio:.2f} %, {1000 * mean.loss:.2f}"


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""
