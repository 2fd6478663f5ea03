"""Control story, third step, forward: budgets for the load that is measured, before it is felt.

With step times by budget and the tokens of the requests known, the law does not wait for latencies:

    down   even at the rate that surely arrives at least, a larger loss is worth it: take what is
           best at the likely rate
    up     even at the rate that arrives at most, a smaller loss is best: take that
    else   stay; the two rates draw nearer to each other while the load stays as it is

What waits beyond the queue's SLO counts as arriving within `load_drain_seconds`. "Best" is the
smallest loss and price of late answers together (law_capacity). Latencies teach, slowly, how much
the server carries; the load tells, quickly, how much it has to. Pure.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from sglang_alloc_controller.law_capacity import (
    Choice,
    Critical,
    Levels,
    best,
    choices,
    learned_from,
    prior,
    work_of,
)
from sglang_alloc_controller.law_load import Load, load_of
from sglang_alloc_controller.law_move import moved
from sglang_alloc_controller.law_state import (
    ForwardState,
    LawConstants,
    LawState,
    PhaseState,
    Pressure,
    Reason,
    Seen,
)
from sglang_alloc_controller.load_history import LoadWindow
from sglang_alloc_controller.samples import PHASES, Phase

Moved = tuple[LawState, dict[Phase, Reason]]

# A load is young, and likely rates count, until this long after it changed; late answers teach
# something from then on, and if the last half of that time was steady.
_YOUNG_SECONDS, _STEADY_SECONDS = 45.0, 24.0
# A lull within a burst is shorter than this.
_LULL_SECONDS = 12.0
# Standard deviations of the likely rate: a needless step down costs little and soon comes back, a
# needless step up costs late answers.
_DOWN_SIGMAS, _UP_SIGMAS = 0.5, 1.5
# A move that changes the work by less than this is worth at most one change in the given times.
_SMALL_MOVE = 0.06
_SMALL_DOWN_SECONDS, _SMALL_UP_SECONDS = 60.0, 300.0
# Two readings are about this far apart.
_READING_SECONDS = 1.0


class _Move(NamedTuple):
    now: Choice
    wanted: Choice


def goes_forward(seen: Seen, constants: LawConstants) -> bool:
    """Tell whether everything is known that this part of the law needs."""
    ranges = constants.ranges
    return bool(seen.load_windows) and all(ranges[phase].step_times for phase in PHASES)


def forward(
    state: LawState, asked: dict[Phase, Pressure], seen: Seen, constants: LawConstants
) -> Moved:
    """Return the state and the reasons after one look at the load."""
    windows = _windows_of_this_load(state, seen, constants)
    load = load_of(windows, constants.law)
    if load is None:
        return state, dict.fromkeys(PHASES, Reason.TOO_FEW_SAMPLES)
    if load.same_seconds < windows[-1].seconds:
        began_seconds = seen.reading_at_seconds - load.same_seconds
        state = replace(
            state, forward=replace(_belief(state, constants), load_since_seconds=began_seconds)
        )
    state = _with_belief(state, load, seen, constants)
    now = _present(state, load, constants)
    low, high = _sure_rates(state, load, asked, seen, constants)
    if _best_at(low, state, load, constants).loss > now.loss:
        likely = max(low, load.likely_per_second)
        wanted = _best_at(likely, state, load, constants)
        if wanted.work_seconds < now.work_seconds:
            return _down(state, _Move(now, wanted), asked, seen, constants)
        return _stay(state, now, asked)
    wanted = _best_at(high, state, load, constants)
    if wanted.loss < now.loss:
        return _up(state, _Move(now, wanted), seen, constants)
    return _stay(state, now, asked)


def _windows_of_this_load(state: LawState, seen: Seen, constants: LawConstants) -> list[LoadWindow]:
    """Return the windows that begin after the load became what it is; one at least."""
    began_seconds = _belief(state, constants).load_since_seconds - _READING_SECONDS
    return [
        window
        for number, window in enumerate(seen.load_windows)
        if number == 0 or seen.reading_at_seconds - window.seconds >= began_seconds
    ]


def _sure_rates(
    state: LawState, load: Load, asked: dict[Phase, Pressure], seen: Seen, constants: LawConstants
) -> tuple[float, float]:
    """Return the requests per second that come at least and at most, to act on.

    A load that has just changed, or that latencies complain about, needs less proof: its likely
    rate counts, but for a little.
    """
    age_seconds = seen.reading_at_seconds - _belief(state, constants).load_since_seconds
    sigma = math.sqrt(load.likely_per_second / load.steady_seconds)
    low, high = load.low_per_second, load.high_per_second
    if age_seconds < _YOUNG_SECONDS or any(one.excess > 0 for one in asked.values()):
        low = max(low, load.likely_per_second - _DOWN_SIGMAS * sigma)
    if _LULL_SECONDS <= age_seconds < _YOUNG_SECONDS:
        high = min(high, load.likely_per_second + _UP_SIGMAS * sigma)
    return low, high


def _best_at(rate: float, state: LawState, load: Load, constants: LawConstants) -> Choice:
    belief = _belief(state, constants)
    return best(
        choices(load, constants.ranges, belief.batch, constants.law),
        rate + _backlog_per_second(state, constants),
        Critical(belief.critical, belief.precision),
        constants.slo.objective_ratio,
        constants.law,
    )


def _is_too_small(move: _Move, since_seconds: float, wait_seconds: float) -> bool:
    """Tell whether a move is small and comes so soon after the last one that it may be noise."""
    share = abs(move.wanted.work_seconds / move.now.work_seconds - 1.0)
    return share < _SMALL_MOVE and since_seconds < wait_seconds


def _down(
    state: LawState,
    move: _Move,
    asked: dict[Phase, Pressure],
    seen: Seen,
    constants: LawConstants,
) -> Moved:
    since_seconds = _since_change_seconds(state, seen)
    if _is_too_small(move, since_seconds, _SMALL_DOWN_SECONDS):
        return state, _reasons(state, Reason.HOLD)
    if since_seconds < constants.law.degrade_hold_seconds:
        return state, _reasons(state, Reason.HOLD)
    worst = max(asked.values(), key=lambda pressure: pressure.excess)
    reason = worst.cause if worst.excess > 0 else Reason.PREDICTED_OVERLOAD
    return _at(state, move.wanted.levels, reason, seen, constants)


def _up(state: LawState, move: _Move, seen: Seen, constants: LawConstants) -> Moved:
    law, since_seconds = constants.law, _since_change_seconds(state, seen)
    if _is_too_small(move, since_seconds, _SMALL_UP_SECONDS):
        return state, _reasons(state, Reason.HOLD)
    if since_seconds < law.restore_hold_seconds:
        return state, _reasons(state, Reason.HOLD)
    if (state.queue_requests or 0.0) > law.queue_restore_ratio * constants.slo.queue_requests:
        return state, _reasons(state, Reason.DRAINING)
    return _at(state, move.wanted.levels, Reason.RESTORE, seen, constants)


def _stay(state: LawState, now: Choice, asked: dict[Phase, Pressure]) -> Moved:
    violating = any(pressure.excess > 0 for pressure in asked.values())
    if violating and max(now.levels) == 0:
        return state, dict.fromkeys(PHASES, Reason.AT_FLOOR)
    return state, _reasons(state, Reason.DEADBAND)


def _at(
    state: LawState, levels: Levels, reason: Reason, seen: Seen, constants: LawConstants
) -> Moved:
    wanted: dict[Phase, int] = {"prefill": levels.prefill, "decode": levels.decode}
    phases: dict[Phase, PhaseState] = {}
    reasons: dict[Phase, Reason] = {}
    for phase, level in wanted.items():
        budgets, old = constants.ranges[phase], state.phases[phase]
        if budgets.level(old.position) == level:
            # The samples of both phases begin anew, since they share the engine.
            phases[phase] = old
            reasons[phase] = Reason.AT_CEILING if old.position >= 1 else Reason.DEADBAND
        else:
            phases[phase] = moved(phase, state, budgets.level_position(level), seen, constants)
            reasons[phase] = reason
    return replace(state, phases=phases), reasons


def _with_belief(state: LawState, load: Load, seen: Seen, constants: LawConstants) -> LawState:
    """Learn from the newest reading, once, unless it may speak of other budgets."""
    belief = _belief(state, constants)
    if seen.reading_at_seconds <= belief.learned_at_seconds:
        return state
    law, newest = constants.law, seen.newest
    batch = max(belief.batch, seen.running_requests)
    critical = Critical(belief.critical, belief.precision)
    settled = _since_change_seconds(state, seen) >= law.load_settle_seconds
    belief = replace(belief, batch=batch, learned_at_seconds=seen.reading_at_seconds)
    known = load.steady_seconds >= _STEADY_SECONDS and load.same_seconds >= _YOUNG_SECONDS
    if newest is not None and settled and known:
        work_seconds = _present(state, load, constants, batch).work_seconds
        critical = learned_from(
            critical,
            utilisation=load.mean_per_second * work_seconds,
            requests=newest.requests,
            missed_ratio=newest.missed_ratio,
            seconds=newest.seconds,
            objective_ratio=constants.slo.objective_ratio,
            law=law,
        )
    return replace(
        state, forward=replace(belief, critical=critical.utilisation, precision=critical.precision)
    )


def _present(
    state: LawState, load: Load, constants: LawConstants, batch: float | None = None
) -> Choice:
    levels = (constants.ranges[phase].level(state.phases[phase].position) for phase in PHASES)
    batch = batch or _belief(state, constants).batch
    return work_of(Levels(*levels), load, constants.ranges, batch, constants.law)


def _belief(state: LawState, constants: LawConstants) -> ForwardState:
    if state.forward is not None:
        return state.forward
    first = prior(constants.law)
    return ForwardState(first.utilisation, first.precision, float(constants.law.cost_batch))


def _backlog_per_second(state: LawState, constants: LawConstants) -> float:
    waiting = (state.queue_requests or 0.0) - constants.slo.queue_requests
    waiting = min(waiting, constants.law.load_backlog_ratio * constants.slo.queue_requests)
    return max(0.0, waiting) / constants.law.load_drain_seconds


def _since_change_seconds(state: LawState, seen: Seen) -> float:
    return seen.now_seconds - max(phase.changed_at_seconds for phase in state.phases.values())


def _reasons(state: LawState, reason: Reason) -> dict[Phase, Reason]:
    return {
        name: Reason.AT_CEILING if phase.position >= 1 else reason
        for name, phase in state.phases.items()
    }
