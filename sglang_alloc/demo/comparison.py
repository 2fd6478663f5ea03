"""Demo, step 3: the order of the runs: full quality before and after the controlled one.

The machine's speed may change from one run to the next. Runs at full quality on both sides of the
controlled one tell by how much, and what full quality would have kept in between lies between
what it kept before and after, as long as the speed moved one way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sglang_alloc.demo.load_plan import BURST, CARRIED_ATTAINMENT_RATIO, LoadPlan
from sglang_alloc.demo.observation import RunRecord
from sglang_alloc.demo.outcome import attainment_ratio

# Bounds the time that the demo takes on a machine that keeps getting faster.
RUNS_MAX = 6
_RUNS_OF_A_COMPARISON = 3

Run = Callable[[LoadPlan], RunRecord]


class Comparison(NamedTuple):
    """Three runs of one trace, in the order in which they were made, and its load."""

    plan: LoadPlan
    before: RunRecord
    controlled: RunRecord
    after: RunRecord


def compare(
    plan: LoadPlan, run_before: Run, run_controlled: Run, run_after: Run, runs_max: int = RUNS_MAX
) -> Comparison:
    """Run full quality, controlled, full quality; raise the burst while full quality carries it.

    What the controlled run does has no say in it. A burst that the last run carried starts the
    comparison again; after `runs_max` runs the last one stands, whether or not full quality missed.
    """
    runs_left = runs_max
    while True:
        before = run_before(plan)
        runs_left -= 1
        kept_ratio = burst_attainment(before, plan)
        if _carried(kept_ratio) and runs_left >= _RUNS_OF_A_COMPARISON:
            plan = plan.raised(kept_ratio)
            continue
        controlled, after = run_controlled(plan), run_after(plan)
        runs_left -= 2
        kept_ratio = burst_attainment(after, plan)
        if not _carried(kept_ratio) or runs_left < _RUNS_OF_A_COMPARISON:
            return Comparison(plan, before, controlled, after)
        plan = plan.raised(kept_ratio)


def burst_attainment(run: RunRecord, plan: LoadPlan) -> float:
    """Return the share of the burst's requests within both SLOs."""
    return attainment_ratio([r for r in run.requests if r.phase == BURST], plan.slo)


def _carried(kept_ratio: float) -> bool:
    return kept_ratio >= CARRIED_ATTAINMENT_RATIO
