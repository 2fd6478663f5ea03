"""Control story, after the last step: what one tick saw and did, for the metrics and the log."""

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import NamedTuple

from sglang_alloc.shared_table import Override, WorkerCounters
from sglang_alloc_controller.law_state import Reason
from sglang_alloc_controller.reading_history import Sample
from sglang_alloc_controller.samples import PHASES, InputState, Phase, Slo


class TickReport(NamedTuple):
    """What one tick saw and did."""

    input_state: InputState
    samples: Mapping[Slo, Sample | None]
    queue_requests: float
    running_requests: float
    sample_age_seconds: float
    reasons: Mapping[Phase, Reason]
    burn_ratios: Mapping[Phase, float | None]
    excesses: Mapping[Phase, float]
    desired: Mapping[Phase, int]
    """What the law asks for; budgets in activations per token."""
    written_before: Mapping[Phase, int]
    written: Mapping[Phase, int]
    generation: int
    override: Override | None
    worker: WorkerCounters | None
    floors: Mapping[Phase, int]
    ceilings: Mapping[Phase, int]
    predicted_losses: Mapping[Phase, float]
    saturation_ratio: float
    source_failures_total: int
    source_error: str | None


def story(tick: TickReport) -> tuple[object, ...]:
    """Return what makes a tick worth a line when it differs from the last one's.

    Reasons alone do not: they change from tick to tick while nothing moves. They are in the
    metrics, and in each line.
    """
    actor = tick.override.actor if tick.override else None
    infeasible = Reason.INFEASIBLE in tick.reasons.values()
    return tick.input_state, dict(tick.written), dict(tick.desired), actor, infeasible


def record(tick: TickReport, mode: str, now: datetime | None = None) -> dict[str, object]:
    """Return the line of the decision log, JSON values only."""
    moment = now or datetime.now(timezone.utc)
    return {
        "time": moment.isoformat(timespec="milliseconds"),
        "mode": mode,
        "state": tick.input_state.value,
        "reasons": {phase: tick.reasons[phase].value for phase in PHASES},
        "actor": tick.override.actor if tick.override else "controller",
        "from": dict(tick.written_before),
        "to": dict(tick.written),
        "desired": dict(tick.desired),
        "generation": tick.generation,
        "samples": {slo: _sample(sample) for slo, sample in tick.samples.items()},
        "burn_ratio": {phase: _rounded(tick.burn_ratios[phase]) for phase in PHASES},
        "error_ratio": {phase: _rounded(tick.excesses[phase]) for phase in PHASES},
        "queue_requests": tick.queue_requests,
        "running_requests": tick.running_requests,
        "sample_age_seconds": _rounded(tick.sample_age_seconds),
        "saturation_ratio": _rounded(tick.saturation_ratio),
        "source_error": tick.source_error,
    }


def _sample(sample: Sample | None) -> dict[str, float | None] | None:
    if sample is None:
        return None
    return {name: _rounded(value) for name, value in sample._asdict().items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)
