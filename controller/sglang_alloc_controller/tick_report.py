"""Control story, after the last step: what one tick saw and did, for metrics, log and page."""

from collections.abc import Mapping
from typing import NamedTuple

from sglang_alloc.shared_table import CalmBudgets, Override, WorkerCounters
from sglang_alloc_controller.law_state import Reason
from sglang_alloc_controller.reading_history import Sample
from sglang_alloc_controller.samples import PHASES, EngineLoad, InputState, Phase, Slo


class CalmReport(NamedTuple):
    """What one tick saw and did of calm steps; None: they have the budgets of all steps."""

    desired: CalmBudgets | None = None
    """What the law asks for."""
    written_before: CalmBudgets | None = None
    written: CalmBudgets | None = None
    predicted_losses: Mapping[Phase, float] = {}
    """Of the written ones, nats per token; empty where there are none."""
    ratios: Mapping[Phase, float | None] = {}
    """Share of the last minute's tokens that were served in calm steps; None: not known."""
    was_busy: Mapping[Phase, bool | None] = {}
    """Whether other steps served tokens since the tick before; None: the workers do not count."""


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
    step_time_ratios: Mapping[Phase, float | None] = dict.fromkeys(PHASES)
    """Time of engine steps over the cost model's, as the law has learned it; None: not known."""
    below_full_seconds_total: float = 0.0
    """Time below full quality since this process started, and within the agreed window."""
    below_full_minutes: float = 0.0
    below_full: bool = False
    """Whether somebody got less than full quality."""
    calm: CalmReport = CalmReport()

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
        return found is not None and any(
            found[phase] < self.ceilings[phase] and not self._was_spared(phase) for phase in PHASES
        )

    def _was_spared(self, phase: Phase) -> bool:
        """Tell whether all tokens of a phase were served at its ceiling, in calm steps."""
        worker = self.worker
        if (
            worker is None
            or self.calm.written is None
            or self.calm.was_busy.get(phase) is not False
        ):
            return False
        if self.calm_written[phase] < self.ceilings[phase]:
            return False
        return worker.follows_controller(self.generation)

    @property
    def calm_desired(self) -> Mapping[Phase, int]:
        """What the law asks for in calm steps."""
        return budgets_of_calm_steps(self.calm.desired, self.desired)

    @property
    def calm_written_before(self) -> Mapping[Phase, int]:
        """What the table had for calm steps before this tick."""
        return budgets_of_calm_steps(self.calm.written_before, self.written_before)

    @property
    def calm_written(self) -> Mapping[Phase, int]:
        """What the table has for calm steps."""
        return budgets_of_calm_steps(self.calm.written, self.written)

    @property
    def calm_losses(self) -> Mapping[Phase, float]:
        """Predicted loss of what the table has for calm steps, nats per token."""
        return {**self.predicted_losses, **self.calm.predicted_losses}

    @property
    def expected_losses(self) -> Mapping[Phase, float]:
        """Predicted loss of both pairs, each by its share of the last minute's tokens.

        Where nothing was counted, that of the smaller budgets: it is at most that.
        """
        calm, busy = self.calm_losses, self.predicted_losses
        shares = {phase: self.calm.ratios.get(phase) or 0.0 for phase in PHASES}
        return {p: shares[p] * calm[p] + (1.0 - shares[p]) * busy[p] for p in PHASES}

    @property
    def actor(self) -> str:
        """Whoever the budgets in force come from."""
        if self.kill_cause is not None:
            return self.kill_cause
        return self.override.actor if self.override else "controller"


def budgets_of_calm_steps(
    calm: CalmBudgets | None, budgets: Mapping[Phase, int]
) -> Mapping[Phase, int]:
    """Return the calm budgets by phase, which are the others where there are none."""
    if calm is None:
        return budgets
    return {"prefill": calm.prefill_budget, "decode": calm.decode_budget}


def story(tick: TickReport) -> tuple[object, ...]:
    """Return what makes a tick worth a line when it differs from the last one's.

    Reasons alone do not: they change from tick to tick while nothing moves. They are in the
    metrics, and in each line.
    """
    infeasible = Reason.INFEASIBLE in tick.reasons.values()
    calm = (tick.calm.written, tick.calm.desired)
    return tick.input_state, dict(tick.written), dict(tick.desired), calm, tick.actor, infeasible
