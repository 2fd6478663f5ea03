"""Control story, third step, upwards: give quality back slowly, where it will last. Pure."""

from dataclasses import replace

from sglang_alloc_controller.law_failures import is_blocked
from sglang_alloc_controller.law_move import moved
from sglang_alloc_controller.law_order import restore_order
from sglang_alloc_controller.law_state import LawConstants, LawState, PhaseState, Reason, Seen
from sglang_alloc_controller.samples import PHASES, SLO_OF_PHASE, Phase

# A ramp goes by tenths of the range: few enough changes to be read in a log.
_RAMP_STEP = 0.1


def restore(
    state: LawState, seen: Seen, constants: LawConstants
) -> tuple[dict[Phase, PhaseState], dict[Phase, Reason]]:
    """Give back one step of one phase, the one with more to get back, or say why not."""
    phases, reasons = dict(state.phases), dict.fromkeys(PHASES, Reason.OTHER_PHASE_FIRST)
    for phase in restore_order(state, seen, constants):
        step, reasons[phase] = _step_up(phase, state, seen, constants)
        if step > 0:
            old = phases[phase]
            phases[phase] = replace(
                moved(phase, state, old.position + step, seen, constants),
                restored_at_seconds=seen.now_seconds,
                position_before_restore=old.position,
            )
            break
    return phases, reasons


def ramped(
    phase: Phase, state: LawState, seen: Seen, constants: LawConstants, way_seconds: float
) -> PhaseState:
    """Go one step of the way to the ceiling that takes `way_seconds` from the floor."""
    old = state.phases[phase]
    step = max(_RAMP_STEP, constants.ranges[phase].smallest_step)
    wait_seconds = step * way_seconds
    if old.position >= 1 or seen.now_seconds - old.changed_at_seconds < wait_seconds:
        return old
    return moved(phase, state, old.position + step, seen, constants)


def survived(phase: PhaseState, seen: Seen, constants: LawConstants) -> PhaseState:
    """End the trial of a step back that lasted."""
    if seen.now_seconds - phase.restored_at_seconds <= constants.law.trial_seconds:
        return phase
    return replace(phase, restored_at_seconds=-float("inf"))


def _step_up(
    phase: Phase, state: LawState, seen: Seen, constants: LawConstants
) -> tuple[float, Reason]:
    refusal = _refusal(phase, state, seen, constants)
    if refusal is not None:
        return 0.0, refusal
    law, old = constants.law, state.phases[phase]
    # The last step to the ceiling may be smaller than steps should be.
    smallest = max(constants.ranges[phase].smallest_step, law.restore_step_min)
    smallest = min(smallest, 1.0 - old.position)
    affordable = affordable_step(old.latency_growth, seen, constants)
    if affordable >= smallest:
        step = max(smallest, min(law.restore_step_max, affordable))
        failing = is_blocked(old, old.position + step, seen, constants)
        return (smallest if failing else step), Reason.RESTORE
    if _since_any_change_seconds(state, seen) >= law.probe_seconds:
        return smallest, Reason.PROBE
    return 0.0, Reason.PREDICTED_VIOLATION


def _refusal(phase: Phase, state: LawState, seen: Seen, constants: LawConstants) -> Reason | None:
    """Return why there can be no step up now, whatever its size, or None."""
    old = state.phases[phase]
    if old.position >= 1:
        return Reason.AT_CEILING
    unhealthy = _unhealthy(phase, state, seen, constants)
    if unhealthy is not None:
        return unhealthy
    if _is_held(state, seen, constants):
        return Reason.HOLD
    next_position = old.position + constants.ranges[phase].smallest_step
    return Reason.BACKOFF if is_blocked(old, next_position, seen, constants) else None


def _is_held(state: LawState, seen: Seen, constants: LawConstants) -> bool:
    return _since_any_change_seconds(state, seen) < constants.law.restore_hold_seconds


def _since_any_change_seconds(state: LawState, seen: Seen) -> float:
    return seen.now_seconds - max(phase.changed_at_seconds for phase in state.phases.values())


def affordable_step(growth: float, seen: Seen, constants: LawConstants) -> float:
    """Return the largest step after which every SLO is predicted to hold, with the margin.

    quantile * (1 + growth * step) <= margin * SLO, for both latencies, because prefill and decode
    share the engine.
    """
    slo, step = constants.slo, 1.0
    thresholds = {"ttft": slo.ttft_seconds, "itl": slo.itl_seconds}
    for name, sample in seen.samples.items():
        threshold = thresholds[name]
        if sample is None or threshold is None or sample.quantile_seconds <= 0:
            continue
        room = constants.law.restore_margin_ratio * threshold / sample.quantile_seconds - 1.0
        step = min(step, room / growth)
    return max(0.0, step)


def _unhealthy(phase: Phase, state: LawState, seen: Seen, constants: LawConstants) -> Reason | None:
    """Return why the SLOs leave no room at all for a step back, or None."""
    law, slo = constants.law, constants.slo
    if (state.queue_requests or 0.0) > law.queue_restore_ratio * slo.queue_requests:
        return Reason.DEADBAND
    for name in PHASES:
        limit = law.restore_burn_ratio if name == phase else law.degrade_burn_ratio
        burn = state.phases[name].burn_ratio
        if burn is not None and burn > limit:
            return Reason.DEADBAND
    threshold = slo.ttft_seconds if SLO_OF_PHASE[phase] == "ttft" else slo.itl_seconds
    waited_seconds = seen.now_seconds - state.phases[phase].changed_at_seconds
    measured = state.phases[phase].burn_ratio is not None or threshold is None
    if not measured and waited_seconds < law.window_max_seconds:
        return Reason.TOO_FEW_SAMPLES
    return None
