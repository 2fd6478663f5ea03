"""Control story, after the last step: the lines of the decision log, and what replay needs in them.

A log begins with a line of `kind` "beginning": settings, bounds and budgets. Each further line of
`kind` "tick" is one tick; with `every_tick` it carries the reading that came in at it.
"""

import math
from collections.abc import Mapping
from datetime import datetime, timezone

from sglang_alloc.shared_table import CalmBudgets
from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.reading_history import Sample
from sglang_alloc_controller.reading_json import reading_to_json
from sglang_alloc_controller.samples import PHASES, Phase, Reading
from sglang_alloc_controller.settings import Settings
from sglang_alloc_controller.shown_url import shown_url
from sglang_alloc_controller.tick_report import CalmReport, TickReport

BEGINNING, TICK = "beginning", "tick"


def beginning(
    settings: Settings,
    ranges: Mapping[Phase, BudgetRange],
    budgets: Mapping[Phase, int],
    calm: CalmBudgets | None,
    now_seconds: float,
    *,
    anew: bool,
    started: bool = False,
) -> dict[str, object]:
    """Return the line from which the law begins anew, or goes on under other settings.

    `started` tells that a process did, which has no readings yet and perhaps another clock.
    """
    content, url = settings.model_dump(mode="json"), settings.source.url
    return {
        "time": _wall_time(None),
        "kind": BEGINNING,
        "anew": anew,
        "started": started,
        "now_seconds": now_seconds,
        "settings": {**content, "source": {**content["source"], "url": shown_url(url)}},
        "ranges": {phase: ranges[phase]._asdict() for phase in PHASES},
        "budgets": dict(budgets),
        "calm": None
        if calm is None
        else {**_pair(calm), "running_requests": calm.running_requests},
    }


def tick_record(
    tick: TickReport, mode: str, reading: Reading | None = None, now: datetime | None = None
) -> dict[str, object]:
    """Return the line of one tick, JSON values only; `reading` is the one that came in at it."""
    override = tick.override
    record: dict[str, object] = {
        "time": _wall_time(now),
        "kind": TICK,
        "now_seconds": tick.now_seconds,
        "mode": mode,
        "state": tick.input_state.value,
        "reasons": {phase: tick.reasons[phase].value for phase in PHASES},
        "actor": tick.actor,
        "killed": tick.kill_cause is not None,
        "override": [override.prefill_budget, override.decode_budget] if override else None,
        "from": dict(tick.written_before),
        "to": dict(tick.written),
        "acknowledged": dict(tick.acknowledged) if tick.acknowledged else None,
        "desired": dict(tick.desired),
        "calm": _calm(tick.calm),
        "generation": tick.generation,
        "samples": {slo: _sample(sample) for slo, sample in tick.samples.items()},
        "burn_ratio": {phase: _rounded(tick.burn_ratios[phase]) for phase in PHASES},
        "error_ratio": {phase: _rounded(tick.excesses[phase]) for phase in PHASES},
        "queue_requests": tick.queue_requests,
        "running_requests": tick.running_requests,
        "sample_age_seconds": _rounded(tick.sample_age_seconds),
        "saturation_ratio": _rounded(tick.saturation_ratio),
        "source_failures_total": tick.source_failures_total,
        "source_error": tick.source_error,
    }
    if reading is not None:
        record["reading"] = reading_to_json(reading)
    return record


def _calm(calm: CalmReport) -> dict[str, object] | None:
    """Return the budgets of calm steps, None where neither the law nor the table has any."""
    newest = calm.desired or calm.written
    if newest is None:
        return None
    return {
        "desired": _pair(calm.desired) if calm.desired else None,
        "written": _pair(calm.written) if calm.written else None,
        "running_requests": newest.running_requests,
    }


def _pair(calm: CalmBudgets) -> dict[str, int]:
    return {"prefill": calm.prefill_budget, "decode": calm.decode_budget}


def _wall_time(now: datetime | None) -> str:
    return (now or datetime.now(timezone.utc)).isoformat(timespec="milliseconds")


def _sample(sample: Sample | None) -> dict[str, float | None] | None:
    if sample is None:
        return None
    return {name: _rounded(value) for name, value in sample._asdict().items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)
