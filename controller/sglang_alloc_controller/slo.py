"""Control story, third step: samples against SLOs become burn rates and pressure. Pure.

    burn  = (1 - share within the SLO) / (1 - objective)         1 is exactly the SLO
    alarm = degrade_burn * (1 + sigmas * sqrt(objective / ((1 - objective) * n)))

The alarm's second term is the standard deviation of the misses of n independent events at the
objective, so that a single slow request of a handful does not move the budget.
"""

import math

from sglang_alloc_controller.law_order import first_down
from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.law_state import LawConstants, LawState, Pressure, Reason, Seen
from sglang_alloc_controller.reading_history import Sample
from sglang_alloc_controller.samples import SLO_OF_PHASE, Phase
from sglang_alloc_controller.settings import SloSettings

# With very few events the alarm would rise above the clamp of the burn rate and never sound.
_ALARM_CAP_OF_CLAMP = 0.8


def burn_ratio(within_ratio: float, objective_ratio: float) -> float:
    """Return misses over allowed misses."""
    return (1.0 - within_ratio) / (1.0 - objective_ratio)


def clamped_burn(sample: Sample | None, slo: SloSettings, law: LawSettings) -> float | None:
    """Return the burn rate, clamped before it is smoothed; None when nothing can be said."""
    if sample is None or sample.within_ratio is None or sample.events < law.min_samples:
        return None
    return min(law.max_burn_ratio, burn_ratio(sample.within_ratio, slo.objective_ratio))


def alarm_burn(independent_events: float, slo: SloSettings, law: LawSettings) -> float:
    """Return the burn rate above which so many events are a violation and not chance."""
    objective = slo.objective_ratio
    spread = math.sqrt(objective / ((1.0 - objective) * independent_events))
    alarm = law.degrade_burn_ratio * (1.0 + law.confidence_sigmas * spread)
    return max(law.degrade_burn_ratio, min(alarm, _ALARM_CAP_OF_CLAMP * law.max_burn_ratio))


def smoothed(previous: float | None, newest: float, law: LawSettings) -> float:
    """Return the exponentially smoothed value."""
    if previous is None:
        return newest
    return previous + law.smoothing_ratio * (newest - previous)


def latency_pressure(
    phase: Phase, state: LawState, seen: Seen, constants: LawConstants
) -> Pressure:
    """Return what this phase's own latency asks for.

    A severe violation of the short window counts at once, unless it is over already: a clump of
    arrivals that was answered late but left no queue and no violation of the long window. A mild
    one counts when a full long window shows it.
    """
    slo, law = SLO_OF_PHASE[phase], constants.law
    cause = Reason.TTFT_SLO if slo == "ttft" else Reason.ITL_SLO
    burn, sample, longer = state.phases[phase].burn_ratio, seen.samples[slo], seen.long_samples[slo]
    long_burn = clamped_burn(longer, constants.slo, law) or 0.0
    if burn is not None and sample is not None and burn >= law.severe_burn_ratio:
        queue = (state.queue_requests or 0.0) / constants.slo.queue_requests
        if long_burn > law.degrade_burn_ratio or queue > law.queue_restore_ratio:
            return _beyond_alarm(burn, sample, cause, constants)
    if longer is None or longer.span_seconds < law.long_window_seconds:
        return Pressure(0.0, cause)
    return _beyond_alarm(long_burn, longer, cause, constants)


def _beyond_alarm(burn: float, sample: Sample, cause: Reason, constants: LawConstants) -> Pressure:
    if burn <= alarm_burn(sample.independent_events, constants.slo, constants.law):
        return Pressure(0.0, cause)
    return Pressure(burn - constants.law.degrade_burn_ratio, cause)


def queue_pressure(state: LawState, constants: LawConstants) -> Pressure:
    """Return what the queue asks for: its length in multiples of its SLO, above one."""
    ratio = (state.queue_requests or 0.0) / constants.slo.queue_requests
    return Pressure(max(0.0, min(ratio, constants.law.max_burn_ratio) - 1.0), Reason.QUEUE_SLO)


def pressures(state: LawState, seen: Seen, constants: LawConstants) -> dict[Phase, Pressure]:
    """Return what each phase is asked for.

    A queue and late first tokens ask the phase that buys the most time per loss (law_order), and
    the other one too when the queue is long or the first has nothing left. Late tokens ask decode,
    and prefill when decode has nothing left.
    """
    own = {phase: latency_pressure(phase, state, seen, constants) for phase in state.phases}
    queue = queue_pressure(state, constants)
    if not any(one.excess > 0 for one in (queue, *own.values())):
        return {"prefill": Pressure(0.0, Reason.TTFT_SLO), "decode": own["decode"]}
    first = first_down(state, seen, constants)
    asks: dict[Phase, list[Pressure]] = {
        "prefill": [Pressure(0.0, Reason.TTFT_SLO)],
        "decode": [own["decode"]],
    }
    asks[first] += [own["prefill"], queue]
    other: Phase = "decode" if first == "prefill" else "prefill"
    if at_floor(first, state.phases[first].position, constants):
        asks[other] += [own["prefill"], queue]
    elif queue.excess + 1.0 >= constants.law.queue_decode_ratio:
        asks[other].append(queue)
    if at_floor("decode", state.phases["decode"].position, constants):
        asks["prefill"].append(own["decode"])
    return {phase: max(asked, key=_excess) for phase, asked in asks.items()}


def at_floor(phase: Phase, position: float, constants: LawConstants) -> bool:
    """Tell whether this phase has nothing left to give up."""
    budgets = constants.ranges[phase]
    return budgets.budget(position) == budgets.floor


def _excess(pressure: Pressure) -> float:
    return pressure.excess
