"""Control story, third step: the control law. Pure: a state and a view in, a state and budgets out.

Each phase has a position p from 0 (floor) to 1 (ceiling); budget = floor + round(p * range).

    error      burn b = misses / allowed misses over a window that begins after the last change
               plus dead time, clamped to `max_burn_ratio`, then smoothed; reset by each change
    pressure   x = max(b - 1 if b is above its alarm (slo.py), queue / queue SLO - 1), where b is
               the short window's if it is severe, else the full long window's
    down       p -= clamp(degrade_gain * x, one activation, degrade_step_max)
    up         p += min(restore_step_max, largest step with
                        quantile * (1 + growth * step) <= restore_margin * SLO for both latencies)

Clamps: 0 <= p <= 1. The position is the only thing that integrates and it is the budget that is in
force, so nothing winds up while it is at a bound, overridden or, in shadow mode, not carried out.

Regimes, first match first:

    STALE      hold for hold_seconds, then ramp to the ceiling in ramp_seconds for each phase, the
               lower one first (or go on holding)
    warm-up    hold: the latencies of a starting engine say nothing
    IDLE       ramp to the ceiling within idle_ramp_seconds
    violation soon after a step up: take that step back; wait longer before the next (back-off)
    violation  TTFT lowers prefill, ITL lowers decode, the queue lowers prefill and, when long,
               decode; a phase at its floor passes its violation on; a shrinking queue is waited for
    saturated  every phase at its floor and still violating: infeasible after a while
    dead band  between the restore and the degrade burn rate, or a queue: nothing
    room       one step up of one phase, after the hold, unless backing off or predicted to violate;
               a step forbidden by the prediction alone is tried after probe_seconds

Calm steps, which leave no request waiting, keep `calm_kept_ratio` of what the others give up.

With step times by budget and a server that tells the prompt tokens it computes, the regimes from
"violation" on are those of law_forward instead: the load decides, and latencies correct it.

A constant is a setting of the section `law`, with its unit and reason in law_settings.py, or stands
with them at the head of the module that uses it.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from sglang_alloc_controller.law_calm import with_calm_steps
from sglang_alloc_controller.law_degrade import degraded, taken_back
from sglang_alloc_controller.law_failures import with_present_load
from sglang_alloc_controller.law_forward import forward, goes_forward
from sglang_alloc_controller.law_move import learned
from sglang_alloc_controller.law_restore import ramped, restore, survived
from sglang_alloc_controller.law_state import (
    Decision,
    LawConstants,
    LawState,
    PhaseState,
    Pressure,
    Reason,
    Seen,
    changed_at_seconds,
    levels_of,
)
from sglang_alloc_controller.samples import PHASES, SLO_OF_PHASE, InputState, Phase
from sglang_alloc_controller.slo import at_floor, clamped_burn, pressures, smoothed

# Share of the saturation metric that a full quality deficit takes; the rest says "and violating".
_DEFICIT_SHARE = 0.8


def decide(state: LawState, seen: Seen, constants: LawConstants) -> tuple[LawState, Decision]:
    """Return the next state and the decision of one tick."""
    if seen.input_state is InputState.STALE:
        return _decide_stale(state, seen, constants)
    if state.stale_since_seconds is not None:
        state = replace(state, stale_since_seconds=None)
    if seen.warming_up:
        return _held(_without_error(state), Reason.WARMUP, constants)
    if seen.input_state is InputState.IDLE:
        return _ramping(_without_error(state), Reason.IDLE, seen, constants)
    state = measured(state, seen, constants)
    asked = pressures(state, seen, constants)
    if goes_forward(seen, constants):
        if state.by_latencies:
            state = replace(state, by_latencies=False)
        return _decide_forward(state, asked, seen, constants)
    if any(pressure.excess > 0 for pressure in asked.values()):
        return _decide_violation(state, asked, seen, constants)
    phases = {name: survived(phase, seen, constants) for name, phase in state.phases.items()}
    state = replace(state, phases=phases, saturated_since_seconds=None)
    phases, reasons = restore(state, seen, constants)
    return _decided(_by_latencies(state, phases), reasons, asked, constants)


def lasts(state: LawState, seen: Seen, decision: Decision, constants: LawConstants) -> bool:
    """Tell whether a decision is the same at every moment until something else is seen.

    So it is where the load decides, nothing complains and the budgets have stayed for this reading:
    whatever else the law waits for goes by the time of the readings.
    """
    belief = state.forward
    return (
        belief is not None
        and belief.load is not None
        and belief.learned_at_seconds == seen.reading_at_seconds
        and changed_at_seconds(state) < seen.now_seconds
        and goes_forward(seen, constants)
        and not any(decision.excesses.values())
    )


def frozen(state: LawState, reason: Reason, seen: Seen) -> LawState:
    """Return the state while something else decides: budgets kept, errors forgotten.

    The samples of an override are not the law's doing, so they count neither as its error nor
    against a step of its own.
    """
    assert reason in {Reason.OVERRIDE, Reason.FIXED}
    phases = {
        name: replace(
            phase,
            changed_at_seconds=seen.now_seconds,
            burn_ratio=None,
            before_change=None,
            restored_at_seconds=-float("inf"),
        )
        for name, phase in state.phases.items()
    }
    return LawState(phases, forward=state.forward, calm=state.calm, by_latencies=state.by_latencies)


def not_taken(before: LawState, after: LawState, constants: LawConstants) -> LawState:
    """Return the state after a decision that nobody carried out: what was learned, nothing moved.

    The next decision starts from the budgets in force again, so it is the same as long as the
    readings ask for it, and nobody counts as having moved the budgets back.
    """
    phases = {
        name: before.phases[name] if phase.position != before.phases[name].position else phase
        for name, phase in after.phases.items()
    }
    belief = after.forward
    if belief is not None and phases != after.phases:
        earlier = before.forward or belief._replace(chosen_for=None, draining=False)
        belief = belief._replace(
            levels=levels_of(before, constants),
            chosen_for=earlier.chosen_for,
            draining=earlier.draining,
        )
    return replace(
        after,
        phases=phases,
        forward=belief,
        calm=before.calm,
        by_latencies=before.by_latencies,
        saturated_since_seconds=None,
    )


def violates(state: LawState, seen: Seen, constants: LawConstants) -> bool:
    """Tell whether what is seen violates an SLO by itself, whatever was smoothed before."""
    fresh = replace(_without_error(state), smoothed_at_seconds=-math.inf)
    asked = pressures(measured(fresh, seen, constants), seen, constants)
    return any(pressure.excess > 0 for pressure in asked.values())


def deficit_saturation(positions: Mapping[Phase, float]) -> float:
    """Return the saturation of a server that keeps its SLOs at these positions."""
    return _DEFICIT_SHARE * (1.0 - min(positions.values()))


def window_start_seconds(state: LawState, constants: LawConstants) -> float:
    """Return the time from which samples speak about the present budgets.

    A change of either phase moves both latencies, since they share the engine.
    """
    return changed_at_seconds(state) + constants.law.dead_time_seconds


def _decide_stale(
    state: LawState, seen: Seen, constants: LawConstants
) -> tuple[LawState, Decision]:
    since = state.stale_since_seconds
    since_seconds = seen.now_seconds if since is None else since
    state = replace(_without_error(state), stale_since_seconds=since_seconds)
    freshness = constants.freshness
    held = seen.now_seconds - since_seconds < freshness.hold_seconds
    if held or freshness.then == "hold":
        state, decision = _held(state, Reason.STALE_HOLD, constants)
    else:
        state, decision = _ramping(state, Reason.STALE_RAMP, seen, constants)
    # An autoscaler that read a number here would act on what nobody knows.
    return state, decision._replace(saturation_ratio=math.nan)


def _decide_violation(
    state: LawState, asked: dict[Phase, Pressure], seen: Seen, constants: LawConstants
) -> tuple[LawState, Decision]:
    phases, reasons = dict(state.phases), dict.fromkeys(PHASES, Reason.HOLD)
    blamed = [name for name in PHASES if _is_on_trial(phases[name], seen, constants)]
    for name in blamed:
        phases[name] = taken_back(name, state, asked[name], seen, constants)
        reasons[name] = Reason.RESTORE_TAKEN_BACK
    for name in PHASES if not blamed else ():
        reasons[name] = Reason.AT_CEILING if phases[name].position >= 1 else Reason.DEADBAND
        if asked[name].excess > 0:
            phases[name], reasons[name] = degraded(name, state, asked[name], seen, constants)
    state = _by_latencies(state, phases)
    return _decided(*_saturation(state, reasons, seen, constants), asked, constants)


def _by_latencies(state: LawState, phases: dict[Phase, PhaseState]) -> LawState:
    """Return the state with the phases as latencies want them.

    What was chosen for calm steps was chosen beside the budgets in force, and goes with these.
    """
    if all(phases[name].position == state.phases[name].position for name in PHASES):
        return replace(state, phases=phases)
    return replace(state, phases=phases, calm=None, by_latencies=True)


def _decide_forward(
    state: LawState, asked: dict[Phase, Pressure], seen: Seen, constants: LawConstants
) -> tuple[LawState, Decision]:
    state, reasons = forward(state, asked, seen, constants)
    if any(pressure.excess > 0 for pressure in asked.values()):
        return _decided(*_saturation(state, reasons, seen, constants), asked, constants)
    if state.saturated_since_seconds is not None:
        state = replace(state, saturated_since_seconds=None)
    return _decided(state, reasons, asked, constants)


def _saturation(
    state: LawState, reasons: dict[Phase, Reason], seen: Seen, constants: LawConstants
) -> tuple[LawState, dict[Phase, Reason]]:
    if not all(at_floor(name, phase.position, constants) for name, phase in state.phases.items()):
        return replace(state, saturated_since_seconds=None), reasons
    since = state.saturated_since_seconds
    since_seconds = seen.now_seconds if since is None else since
    if seen.now_seconds - since_seconds >= constants.law.infeasible_after_seconds:
        reasons = dict.fromkeys(PHASES, Reason.INFEASIBLE)
    return replace(state, saturated_since_seconds=since_seconds), reasons


def measured(state: LawState, seen: Seen, constants: LawConstants) -> LawState:
    """Take a new reading in: smooth the queue and the burn rates, learn from the last change."""
    if seen.reading_at_seconds <= state.smoothed_at_seconds:
        return state
    # Clamped before it is smoothed: an absurd gauge is not remembered for long.
    queue = min(seen.queue_requests, constants.law.max_burn_ratio * constants.slo.queue_requests)
    phases = {}
    for name, phase in state.phases.items():
        sample = seen.samples[SLO_OF_PHASE[name]]
        burn = clamped_burn(sample, constants.slo, constants.law)
        if burn is not None:
            burn = smoothed(phase.burn_ratio, burn, constants.law)
        phases[name] = replace(
            with_present_load(learned(name, state, seen, constants), seen, constants),
            burn_ratio=burn,
        )
    return replace(
        state,
        phases=phases,
        queue_requests=smoothed(state.queue_requests, queue, constants.law),
        smoothed_at_seconds=seen.reading_at_seconds,
    )


def _is_on_trial(phase: PhaseState, seen: Seen, constants: LawConstants) -> bool:
    return seen.now_seconds - phase.restored_at_seconds <= constants.law.trial_seconds


def _without_error(state: LawState) -> LawState:
    """Forget the errors: what follows a pause must be judged by samples of its own."""
    phases = {name: replace(phase, burn_ratio=None) for name, phase in state.phases.items()}
    return replace(state, phases=phases, queue_requests=None, saturated_since_seconds=None)


def _held(state: LawState, reason: Reason, constants: LawConstants) -> tuple[LawState, Decision]:
    return _decided(state, dict.fromkeys(PHASES, reason), {}, constants)


def _ramping(
    state: LawState, reason: Reason, seen: Seen, constants: LawConstants
) -> tuple[LawState, Decision]:
    phases = dict(state.phases)
    if reason is Reason.IDLE:
        for name in PHASES:
            phases[name] = ramped(name, state, seen, constants, constants.law.idle_ramp_seconds)
    else:  # the lower phase first: nobody sees what it costs
        lowest = min(phase.position for phase in state.phases.values())
        for name in PHASES:
            if state.phases[name].position == lowest:
                phases[name] = ramped(
                    name, state, seen, constants, constants.freshness.ramp_seconds
                )
    return _held(replace(state, phases=phases), reason, constants)


def _decided(
    state: LawState,
    reasons: dict[Phase, Reason],
    asked: dict[Phase, Pressure],
    constants: LawConstants,
) -> tuple[LawState, Decision]:
    positions = {name: phase.position for name, phase in state.phases.items()}
    excesses = {name: asked[name].excess if asked else 0.0 for name in PHASES}
    saturated = state.saturated_since_seconds is not None
    saturation_ratio = 1.0 if saturated else deficit_saturation(positions)
    decision = Decision(positions, reasons, excesses, saturation_ratio)
    return state, with_calm_steps(decision, state, constants)
