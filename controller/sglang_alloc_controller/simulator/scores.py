"""Simulator, last step: what a run was worth. Pure arithmetic."""

import math
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from sglang_alloc_controller.settings import SloSettings
from sglang_alloc_controller.simulator.engine import Outcome
from sglang_alloc_controller.simulator.plant import Plant
from sglang_alloc_controller.simulator.run_law import Run

_HOUR_SECONDS = 3600.0
# Settled: every window of this length from then on keeps the objective.
_SETTLING_WINDOW_SECONDS = 30.0


class Score(NamedTuple):
    """One run in numbers; every request counts, also one that was lost."""

    slo_attainment_ratio: float
    """Share of the requests within both SLOs: TTFT, and mean inter-token latency."""
    mean_predicted_loss: float
    """Nats per generated token, prefill's and decode's added."""
    seconds_below_full: float
    """As the controller counts them; calm steps at full quality are not below it."""
    changes_per_hour: float
    goodput_per_second: float
    """Requests within both SLOs per second."""
    worst_minute_ratio: float
    """Smallest attainment of the requests of one minute (of those with ten or more)."""
    overshoot_loss: float
    """Largest predicted loss in force after the disturbance over its median then; NaN: none.

    Of the budgets of busy steps, which is the most that anybody was served at.
    """
    settling_seconds: float
    """From the disturbance until the objective is kept for good; NaN: no disturbance."""


def within_slo(outcome: Outcome, slo: SloSettings) -> bool:
    """Tell whether a request kept both SLOs; a lost one kept none."""
    if outcome.lost:
        return False
    ttft_kept = slo.ttft_seconds is None or outcome.ttft_seconds <= slo.ttft_seconds
    return ttft_kept and (slo.itl_seconds is None or outcome.itl_seconds <= slo.itl_seconds)


def score(run: Run, plant: Plant, slo: SloSettings) -> Score:
    """Return the numbers of a run."""
    kept = sum(within_slo(outcome, slo) for outcome in run.outcomes)
    windows = dict(_by_window(run, slo, 60.0))
    overshoot, settling = _after_disturbance(run, plant, slo)
    return Score(
        slo_attainment_ratio=kept / max(1, len(run.outcomes)),
        mean_predicted_loss=run.mean_loss,
        seconds_below_full=run.below_full_seconds,
        changes_per_hour=(len(run.changes) - 1) * _HOUR_SECONDS / run.end_seconds,
        goodput_per_second=kept / run.end_seconds,
        worst_minute_ratio=min(windows.values(), default=math.nan),
        overshoot_loss=overshoot,
        settling_seconds=settling,
    )


def _spells(run: Run, since_seconds: float) -> Iterable[tuple[float, tuple[int, int]]]:
    """Yield (seconds, budgets) of each spell between two changes."""
    ends = [*(change.seconds for change in run.changes[1:]), run.end_seconds]
    for change, end in zip(run.changes, ends, strict=True):
        seconds = end - max(change.seconds, since_seconds)
        if seconds > 0:
            yield seconds, change.budgets


def _by_window(run: Run, slo: SloSettings, seconds: float) -> Iterable[tuple[int, float]]:
    """Yield (window, attainment of the requests that arrived in it), by ten or more requests."""
    counts: dict[int, list[int]] = {}
    for outcome in run.outcomes:
        window = int(run.workload.arrival_seconds[outcome.request] / seconds)
        count = counts.setdefault(window, [0, 0])
        count[0] += 1
        count[1] += within_slo(outcome, slo)
    for window, (requests, kept) in sorted(counts.items()):
        if requests >= 10:
            yield window, kept / requests


def _after_disturbance(run: Run, plant: Plant, slo: SloSettings) -> tuple[float, float]:
    since = run.scenario.disturbed_at_seconds
    if since is None:
        return math.nan, math.nan
    spells = sorted((plant.loss(budgets), seconds) for seconds, budgets in _spells(run, since))
    median_loss = _weighted_median(spells)
    late = [
        (window + 1) * _SETTLING_WINDOW_SECONDS
        for window, ratio in _by_window(run, slo, _SETTLING_WINDOW_SECONDS)
        if ratio < slo.objective_ratio
    ]
    position = bisect_right(late, since)
    settling = late[-1] - since if position < len(late) else 0.0
    return spells[-1][0] - median_loss, settling


def _weighted_median(sorted_spells: list[tuple[float, float]]) -> float:
    half, passed = sum(seconds for _, seconds in sorted_spells) / 2, 0.0
    for loss, seconds in sorted_spells:
        passed += seconds
        if passed >= half:
            return loss
    return math.nan
