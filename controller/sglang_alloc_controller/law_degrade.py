"""Control story, third step, downwards: give up quality, fast but not twice for one cause. Pure."""

from dataclasses import replace

from sglang_alloc_controller.law_move import moved
from sglang_alloc_controller.law_state import (
    LawConstants,
    LawState,
    PhaseState,
    Pressure,
    Reason,
    Seen,
)
from sglang_alloc_controller.samples import Phase
from sglang_alloc_controller.slo import at_floor

# A queue this much shorter than at the last change is shrinking, not fluctuating.
_DRAINED_RATIO = 0.9


def degraded(
    phase: Phase, state: LawState, pressure: Pressure, seen: Seen, constants: LawConstants
) -> tuple[PhaseState, Reason]:
    """Answer a violation: a step down, or the reason why not now."""
    old, law = state.phases[phase], constants.law
    if at_floor(phase, old.position, constants):
        return old, Reason.AT_FLOOR
    if seen.now_seconds - old.changed_at_seconds < law.degrade_hold_seconds:
        return old, Reason.HOLD
    if pressure.cause is not Reason.ITL_SLO and _is_draining(old, state, seen, constants):
        return old, Reason.DRAINING
    step = degrade_step(phase, pressure, constants)
    return moved(phase, state, old.position - step, seen, constants), pressure.cause


def degrade_step(phase: Phase, pressure: Pressure, constants: LawConstants) -> float:
    """Return how much to give up: in proportion to the excess, at least one activation."""
    law = constants.law
    wanted = min(law.degrade_step_max, law.degrade_gain * pressure.excess)
    return max(constants.ranges[phase].smallest_step, wanted)


def taken_back(
    phase: Phase, state: LawState, pressure: Pressure, seen: Seen, constants: LawConstants
) -> PhaseState:
    """Undo the step back that is blamed, and wait longer than last time before the next one."""
    old, law = state.phases[phase], constants.law
    position = old.position_before_restore
    if pressure.excess > 0:
        position = min(position, old.position - degrade_step(phase, pressure, constants))
    backoff_seconds = law.backoff_seconds
    if old.backoff_seconds > 0:
        backoff_seconds = min(law.backoff_max_seconds, old.backoff_seconds * law.backoff_factor)
    return replace(
        moved(phase, state, position, seen, constants),
        restored_at_seconds=-float("inf"),
        backoff_seconds=backoff_seconds,
        blocked_until_seconds=seen.now_seconds + backoff_seconds,
    )


def _is_draining(phase: PhaseState, state: LawState, seen: Seen, constants: LawConstants) -> bool:
    """Tell whether the last step is at work: the queue shrinks, so more would be too much."""
    since_change_seconds = seen.now_seconds - phase.changed_at_seconds
    if since_change_seconds > constants.law.drain_patience_seconds:
        return False
    return (state.queue_requests or 0.0) < _DRAINED_RATIO * phase.queue_at_change
