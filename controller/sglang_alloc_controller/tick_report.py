"""Control story, after the last step: what one tick saw and did, for metrics, log and page."""

from collections.abc import Mapping
from typing import NamedTuple

from sglang_alloc.shared_table import Override, WorkerCounters
from sglang_alloc_controller.law_state import Reason
from sglang_alloc_controller.reading_history import Sample
from sglang_alloc_controller.samples import PHASES, EngineLoad, InputState, Phase, Slo


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
    now_seconds: float = 0.0
    """Monotonic clock."""
    kill_cause: str | None = None
    """What holds the kill switch on."""
    load: EngineLoad | None = None
    decode_step_seconds: float | None = None
    """Mean time of a decode step between the last two readings, of the slowest rank."""
    below_full_seconds_total: float = 0.0
    """Time below full quality since this process started, and within the agreed window."""
    below_full_minutes: float = 0.0

    @property
    def acknowledged(self) -> Mapping[Phase, int] | None:
        """Budgets of the rank that is furthest behind; None: no rank yet."""
        if self.worker is None:
            return None
        return {"prefill": self.worker.prefill_budget, "decode": self.worker.decode_budget}

    @property
    def is_below_full(self) -> bool:
        """Whether a rank uses less than the ceiling of a phase."""
        found = self.acknowledged
        return found is not None and any(found[phase] < self.ceilings[phase] for phase in PHASES)

    @property
    def actor(self) -> str:
        """Whoever the budgets in force come from."""
        if self.kill_cause is not None:
            return self.kill_cause
        return self.override.actor if self.override else "controller"


def story(tick: TickReport) -> tuple[object, ...]:
    """Return what makes a tick worth a line when it differs from the last one's.

    Reasons alone do not: they change from tick to tick while nothing moves. They are in the
    metrics, and in each line.
    """
    infeasible = Reason.INFEASIBLE in tick.reasons.values()
    return tick.input_state, dict(tick.written), dict(tick.desired), tick.actor, infeasible
