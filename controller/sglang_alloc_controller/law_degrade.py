"""Control story, third step, downwards: give up quality, fast but not twice for one cause. Pure."""

from dataclasses import replace

from sglang_alloc_controller.law_failures import with_failure
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
    own_matter = pressure.cause is Reason.ITL_SLO
    changes = (old,) if own_matter else state.phases.values()
    changed_at_seconds = max(one.changed_at_seconds for one in changes)
    if seen.now_seconds - changed_at_seconds < law.degrade_hold_seconds:
        return old, Reason.HOLD
    if not own_matter and _is_draining(old, state, seen, constants):
        return old, Reason.DRAINING
    step = degrade_step(phase, pressure, constants)
    failures = with_failure(old, seen, law.restore_after_degrade_seconds, constants)
    lower = moved(phase, state, old.position - step, seen, constants)
    return replace(lower, failures=failures), pressure.cause


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
    return replace(
        moved(phase, state, position, seen, constants),
        restored_at_seconds=-float("inf"),
        failures=with_failure(old, seen, law.backoff_seconds, constants),
    )


def _is_draining(phase: PhaseState, state: LawState, seen: Seen, constants: LawConstants) -> bool:
    """Tell whether the last step is at work: the queue shrinks, so more would be too much."""
    since_change_seconds = seen.now_seconds - phase.changed_at_seconds
    if since_change_seconds > constants.law.drain_patience_seconds:
        return False
    return (state.queue_requests or 0.0) < _DRAINED_RATIO * phase.queue_at_change
