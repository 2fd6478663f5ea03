"""Offline story, judging: from measured points to the statements that the report makes."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sglang_alloc.evaluation.decode_union import PLAIN_RULE, text_name, union_name
from sglang_alloc.evaluation.intervals import Interval, at_usage, mean_interval
from sglang_alloc.evaluation.points import Point, Points
from sglang_alloc.evaluation.rules import BASELINES, CORRECTED, DEFAULT_RULE

FULL_RULE = "full"


class Comparison(NamedTuple):
    """The default rule against another one, at the mean k that the default was measured at."""

    budget: int
    mean_k: float
    default_loss: Interval
    rival: str
    rival_loss: float
    difference: Interval  # default minus rival: below zero, the default is better


class UnionFinding(NamedTuple):
    """Mode `union` against plain k, at equal distinct experts per decode step."""

    batch: int
    budget: int
    distinct_experts: float
    union_loss: Interval
    plain_loss: float
    difference: Interval  # union minus plain
    ratio: float  # of the losses above full


def baselines() -> tuple[str, ...]:
    """Every rule that the default has to beat: the published ones, and uniform k corrected."""
    return (*BASELINES, *(name for name in CORRECTED if name.startswith("uniform k")))


def losses_above_full(points: Points, point: Point) -> NDArray[np.float64]:
    """NLL of each window above the full model's, in nats per token."""
    full = next(p for p in points.values() if p.rule == FULL_RULE)
    above: NDArray[np.float64] = np.array(point.samples["nll"]) - np.array(full.samples["nll"])
    return above


def compare(points: Points, budget: int, rival: str) -> Comparison:
    """Compare at a budget; the rival is interpolated to the default's measured mean k."""
    default = points[DEFAULT_RULE, budget]
    ours = losses_above_full(points, default)
    curve = [p for p in points.values() if p.rule in {rival, FULL_RULE}]
    theirs = at_usage(
        [p.mean_k for p in curve], [list(losses_above_full(points, p)) for p in curve],
        default.mean_k,
    )  # fmt: skip
    return Comparison(
        budget, default.mean_k, mean_interval(ours), rival, float(theirs.mean()),
        mean_interval(ours - theirs),
    )  # fmt: skip


def best_rival(points: Points, budget: int, rivals: Iterable[str] | None = None) -> Comparison:
    """The comparison with the rival of least loss, by default of the measured baselines."""
    measured = {rule for rule, _ in points}
    found = [compare(points, budget, rival) for rival in rivals or baselines() if rival in measured]
    return min(found, key=lambda comparison: comparison.rival_loss)


def union_findings(points: Points, batches: Iterable[int]) -> list[UnionFinding]:
    """Compare every measured union row with plain k at as many distinct experts per step."""
    plain = [p for p in points.values() if p.rule in {text_name(PLAIN_RULE), FULL_RULE}]
    found = []
    for batch in batches:
        rows = sorted((p for p in points.values() if p.rule == union_name(batch)),
                      key=lambda p: p.budget)  # fmt: skip
        used = [p.distinct_experts[batch] for p in plain]
        curve = [list(losses_above_full(points, p)) for p in plain]
        for row in rows:
            distinct = row.distinct_experts[batch]
            theirs, ours = at_usage(used, curve, distinct), losses_above_full(points, row)
            found.append(
                UnionFinding(
                    batch, row.budget, distinct, mean_interval(ours), float(theirs.mean()),
                    mean_interval(ours - theirs), float(ours.mean() / theirs.mean()),
                )
            )  # fmt: skip
    return found


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's correlation of two series without ties worth minding."""
    ranks = [np.argsort(np.argsort(np.asarray(values))) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def measured_losses(points: Points, rule: str) -> dict[int, float]:
    """Mean loss above full by budget, of a rule that was measured on text alone."""
    rows = sorted((p for p in points.values() if p.rule == text_name(rule)), key=lambda p: p.budget)
    return {p.budget: float(losses_above_full(points, p).mean()) for p in rows}
