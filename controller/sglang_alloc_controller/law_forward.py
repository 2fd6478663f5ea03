"""Control story, third step, forward: budgets for the load that is measured, before it is felt.

With step times by budget and the tokens of the requests known, the law does not wait for latencies.
Once per reading it looks whether the load changed (law_load), what the server's own step times say
of its bench (law_steps), what each pair of levels would cost under the present load, in loss and
late answers (law_capacity), and takes the cheapest pair if that is worth a change now (law_wait).

Where loads came and went, the next peak is insured against: a budget is charged with the late
answers that the peak would bring before it is seen, as often as peaks came in the last half hour.
Late answers teach how much the server carries, by the rate of the last 100 s, but only
`_LEARN_DELAY_SECONDS` later and if the load had not changed by then: those between a change and its
detection say nothing about the budgets.
"""

import math
from dataclasses import replace

from sglang_alloc_controller.law_calm import Plans, plans_of, running_limit
from sglang_alloc_controller.law_capacity import (
    NO_CHOICES,
    Choices,
    Critical,
    Demand,
    Engine,
    Levels,
    Works,
    choices,
    felt,
    learned_from,
    prior,
    work_of,
    works_of,
)
from sglang_alloc_controller.law_gain import slowdown_of
from sglang_alloc_controller.law_load import Load, changed_window, load_of, within_age
from sglang_alloc_controller.law_move import moved
from sglang_alloc_controller.law_state import (
    Calm,
    Evidence,
    ForwardState,
    LawConstants,
    LawState,
    PhaseState,
    Pressure,
    Reason,
    Seen,
    calm_levels_of,
    changed_at_seconds,
    has_step_times,
    levels_of,
)
from sglang_alloc_controller.law_steps import with_step_times
from sglang_alloc_controller.law_wait import (
    PEAKS_RESTLESS,
    Look,
    is_restless,
    refusal,
    with_alarm,
)
from sglang_alloc_controller.samples import PHASES, Phase
from sglang_alloc_controller.slo import alarm_burn, clamped_burn

Moved = tuple[LawState, dict[Phase, Reason]]

# A change is seen within this time, even where metrics are late.
_LEARN_DELAY_SECONDS = 15.0
# Peaks are remembered for so long; one is answered after so long.
_PEAK_MEMORY_SECONDS, _REACTION_SECONDS, _PEAK_RATIO = 1800.0, 8.0, 1.2
# What counts of the variance of a rate: all of it would have the first cut under a load too deep.
_COMPOUND = 0.8
# Once the load is older than this, a rate that is higher than it was thought to be is answered
# before many are late, and its doubt counts the less the older the load.
_DOUBT_SECONDS = 12.0
# Weight of a reading in the mean of the running requests: about a minute.
_RUNNING_READINGS = 60.0
# Over so long without a first token a load cannot be told: requests that do not stream have none.
_BLIND_SECONDS = 60.0
# Far fewer late answers than are allowed are predicted, and more than allowed are seen for a whole
# long window of one load: then the bench is of another server, and the law believes less of it.
_REFUTED_SHARE, _REFUTED_STEP = 0.1, 0.01
# The least share of the TTFT SLO that is left for waiting.
_SLACK_MIN = 0.2


def goes_forward(seen: Seen, constants: LawConstants) -> bool:
    """Tell whether everything is known that this part of the law needs."""
    if not seen.load_windows or not has_step_times(constants):
        return False
    longest = seen.load_windows[-1]
    return longest.requests > 0 or longest.seconds < _BLIND_SECONDS


def forward(
    state: LawState, asked: dict[Phase, Pressure], seen: Seen, constants: LawConstants
) -> Moved:
    """Return the state and the reasons after one look at the load."""
    belief = state.forward or first_belief(constants)
    if seen.reading_at_seconds <= belief.learned_at_seconds:
        return state, _reasons(state, belief.reason)
    belief = _with_load(belief, seen, constants)
    levels = levels_of(state, constants)
    taken_over = belief.levels is not None and belief.levels != levels
    belief = with_alarm(belief, taken_over, state, seen, constants)
    load = belief.load
    if load is None:
        belief = belief._replace(learned_at_seconds=seen.reading_at_seconds)
        return replace(state, forward=belief), dict.fromkeys(PHASES, Reason.TOO_FEW_SAMPLES)
    in_force = levels, calm_levels_of(state, constants)
    belief = with_step_times(belief, in_force, state, seen, constants)
    engine = _engine(belief, load, constants)
    demand = _demand(belief, load, state, seen, constants)
    works = works_of(load, constants.ranges, engine, constants.law)
    # At full quality others are weighed only where it costs something.
    is_full = set(in_force) == {_full(constants)}
    found = NO_CHOICES if is_full else choices(works, constants.ranges)
    plans = _plans(found, works, demand, in_force, constants)
    now = plans.in_force
    utilisation = felt(load.recent_per_second * now.work_seconds, seen.dispersion)
    belief = belief._replace(busy_share=now.busy_share)
    belief = _with_evidence(belief, utilisation, state, seen, constants)
    belief = _refuted(belief, utilisation, seen, constants)
    violating = any(one.excess > 0 for one in asked.values())
    age_seconds = seen.reading_at_seconds - belief.load_since_seconds
    if is_full and plans.cost_in_force(demand, belief.critical, constants) > 0:
        found = choices(works, constants.ranges)
        plans = _plans(found, works, demand, in_force, constants)
    wanted, gain = plans.cheapest(demand, belief.critical, constants)
    look = Look(now, wanted, gain, age_seconds, violating)
    reason = refusal(belief, look, state, seen, constants)
    if reason is not None:
        belief = belief._replace(reason=reason, levels=look.now.levels)
        return replace(state, forward=belief), _reasons(state, reason)
    draining = look.down and is_restless(belief, look.age_seconds)
    belief = belief._replace(
        reason=Reason.HOLD,
        levels=look.wanted.levels,
        chosen_for=load,
        draining=draining and _backlog_per_second(state, constants) > 0,
    )
    reason = Reason.RESTORE
    if look.down:
        worst = max(asked.values(), key=lambda pressure: pressure.excess)
        reason = worst.cause if look.violating else Reason.PREDICTED_OVERLOAD
    limit = running_limit(belief.batch, constants.law)
    calm = Calm(look.wanted.calm, limit, changed_at_seconds=seen.now_seconds)
    state = replace(state, forward=belief, calm=calm)
    return _at(state, look.wanted.levels, reason, seen, constants)


def first_belief(constants: LawConstants) -> ForwardState:
    """Return what is believed before anything was seen."""
    first = prior(constants.law)
    return ForwardState(first.utilisation, first.precision, float(constants.law.cost_batch))


def _with_load(belief: ForwardState, seen: Seen, constants: LawConstants) -> ForwardState:
    now = seen.reading_at_seconds
    if belief.load_since_seconds == -math.inf:
        belief = belief._replace(load_since_seconds=now - seen.load_windows[-1].seconds)
    windows = within_age(seen.load_windows, now - belief.load_since_seconds)
    age = now - belief.load_since_seconds
    if len(belief.peaks) >= PEAKS_RESTLESS:
        age = 0.0
    change = changed_window(windows, age, constants.law)
    before = belief.load
    peaks = tuple(one for one in belief.peaks if now - one[0] < _PEAK_MEMORY_SECONDS)
    if change is not None:
        since = now - change.seconds
        rate = before.rate_per_second if before else None
        if rate is not None and change.arrivals / change.seconds < rate:
            peaks = (*peaks, (now, rate))
        belief = belief._replace(
            load_since_seconds=since,
            before_per_second=rate,
            pending=tuple(one for one in belief.pending if one.at_seconds <= since),
        )
        windows = within_age(windows, change.seconds)
    load = load_of(windows, belief.before_per_second, before)
    mean = belief.running
    mean += (seen.running_requests - mean) / _RUNNING_READINGS
    return belief._replace(
        load=load, peaks=peaks, batch=max(belief.batch, seen.running_requests), running=mean
    )


def _with_evidence(
    belief: ForwardState,
    utilisation: float,
    state: LawState,
    seen: Seen,
    constants: LawConstants,
) -> ForwardState:
    now, law, newest = seen.reading_at_seconds, constants.law, seen.newest
    pending = belief.pending
    changed_at = max(belief.load_since_seconds, changed_at_seconds(state))
    if newest is not None and now - newest.seconds >= changed_at + law.load_settle_seconds:
        evidence = Evidence(
            now, utilisation, newest.requests, newest.missed_ratio, newest.seconds
        )  # fmt: skip
        pending = (*pending, evidence)
    critical = Critical(belief.critical, belief.precision)
    while pending and now - pending[0].at_seconds >= _LEARN_DELAY_SECONDS:
        one, pending = pending[0], pending[1:]
        critical = learned_from(
            critical,
            utilisation=one.utilisation,
            requests=one.requests,
            missed_ratio=one.missed_ratio,
            seconds=one.seconds,
            objective_ratio=constants.slo.objective_ratio,
            law=law,
        )
    return belief._replace(
        critical=critical.utilisation,
        precision=critical.precision,
        pending=pending,
        learned_at_seconds=now,
    )


def _refuted(
    belief: ForwardState, utilisation: float, seen: Seen, constants: LawConstants
) -> ForwardState:
    """Return a lower critical utilisation where late answers contradict the present one flatly.

    So far from it each of them teaches next to nothing, since strays explain it better.
    """
    law, slo = constants.law, constants.slo
    odds = math.exp(min(0.0, law.load_slope * (utilisation - belief.critical)))
    age_seconds = seen.reading_at_seconds - belief.load_since_seconds
    if odds > _REFUTED_SHARE or age_seconds < law.long_window_seconds:
        return belief
    for sample in seen.long_samples.values():
        burn = clamped_burn(sample, slo, law)
        if sample is None or burn is None or sample.span_seconds < law.long_window_seconds:
            continue
        if burn > alarm_burn(sample.independent_events, slo, law):
            critical = max(_REFUTED_STEP, belief.critical - _REFUTED_STEP)
            return belief._replace(critical=critical)
    return belief


def _plans(
    found: Choices,
    works: Works,
    demand: Demand,
    in_force: tuple[Levels, Levels],
    constants: LawConstants,
) -> Plans:
    busy, calm = (work_of(levels, works, constants.ranges) for levels in in_force)
    return plans_of(found, (busy, calm), demand, constants.law)


def _full(constants: LawConstants) -> Levels:
    return Levels(*(len(constants.ranges[phase].levels) - 1 for phase in PHASES))


def _demand(
    belief: ForwardState,
    load: Load,
    state: LawState,
    seen: Seen,
    constants: LawConstants,
) -> Demand:
    age_seconds = seen.reading_at_seconds - belief.load_since_seconds
    rate = load.rate_per_second
    if is_restless(belief, age_seconds):
        rate += _backlog_per_second(state, constants)
    peaks = [peak for _, peak in belief.peaks if peak > _PEAK_RATIO * load.rate_per_second]
    # Before any change there is no doubt: what shows a change exaggerates it, a start does not.
    doubt = 0.0
    if belief.before_per_second is not None:
        doubt = _COMPOUND * load.variance * min(1.0, _DOUBT_SECONDS / max(1.0, age_seconds))
    weight = len(peaks) * _REACTION_SECONDS / _PEAK_MEMORY_SECONDS
    return Demand(rate, doubt, max(peaks, default=0.0), weight, seen.dispersion)


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


def _engine(belief: ForwardState, load: Load, constants: LawConstants) -> Engine:
    slo_seconds = constants.slo.ttft_seconds
    slowdown, slack = slowdown_of(belief.prefill_gain, belief.decode_gain), 1.0
    if slo_seconds is not None:
        prefill = constants.ranges["prefill"]
        own = prefill.step_seconds(len(prefill.levels) - 1, load.prefill_tokens)
        slack = max(_SLACK_MIN, 1.0 - own * slowdown / slo_seconds)
    factors = belief.prefill_gain.factor(), belief.decode_gain.factor()
    return Engine(belief.batch, belief.running, slack, *factors, slowdown)


def _backlog_per_second(state: LawState, constants: LawConstants) -> float:
    waiting = (state.queue_requests or 0.0) - constants.slo.queue_requests
    waiting = min(waiting, constants.law.load_backlog_ratio * constants.slo.queue_requests)
    return max(0.0, waiting) / constants.law.load_drain_seconds


def _reasons(state: LawState, reason: Reason) -> dict[Phase, Reason]:
    return {
        name: Reason.AT_CEILING if phase.position >= 1 else reason
        for name, phase in state.phases.items()
    }
