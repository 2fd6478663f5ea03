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
from sglang_alloc.demo.outcome import attainment_ratio, served_per_second

# Bounds the time that the demo takes on a machine that keeps getting faster.
RAISES_MAX = 2

Run = Callable[[LoadPlan], RunRecord]


class Comparison(NamedTuple):
    """Three runs of one trace, in the order in which they were made, and its load."""

    plan: LoadPlan
    before: RunRecord
    controlled: RunRecord
    after: RunRecord


def compare(plan: LoadPlan, run_before: Run, run_controlled: Run, run_after: Run) -> Comparison:
    """Run full quality, controlled, full quality; first raise the burst until full quality misses.

    What the controlled run does has no say in the load. After RAISES_MAX raises the comparison is
    made whether or not full quality missed, and the report says so.
    """
    before = run_before(plan)
    while (kept_ratio := burst_attainment(before, plan)) >= CARRIED_ATTAINMENT_RATIO:
        if len(plan.carried) == RAISES_MAX:
            break
        plan = plan.raised(kept_ratio, served_per_second(before, BURST))
        before = run_before(plan)
    return Comparison(plan, before, run_controlled(plan), run_after(plan))


def burst_attainment(run: RunRecord, plan: LoadPlan) -> float:
    """Return the share of the burst's requests within both SLOs."""
    return attainment_ratio([r for r in run.requests if r.phase == BURST], plan.slo)
