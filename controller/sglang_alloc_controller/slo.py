"""Control story, third step: samples against SLOs become burn rates and pressure. Pure.

    burn  = (1 - share within the SLO) / (1 - objective)         1 is exactly the SLO
    alarm = degrade_burn * (1 + sigmas * sqrt(objective / ((1 - objective) * n)))

The alarm's second term is the standard deviation of the misses of n independent events at the
objective, so that a single slow request of a handful does not move the budget.
"""

import math

from sglang_alloc_controller.law_state import LawConstants, LawState, Pressure, Reason, Seen
from sglang_alloc_controller.reading_history import Sample
from sglang_alloc_controller.samples import SLO_OF_PHASE, Phase
from sglang_alloc_controller.settings import LawSettings, SloSettings

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

    A severe violation counts from the short window at once, a mild one from a full long window.
    """
    slo, law = SLO_OF_PHASE[phase], constants.law
    cause = Reason.TTFT_SLO if slo == "ttft" else Reason.ITL_SLO
    burn, sample, longer = state.phases[phase].burn_ratio, seen.samples[slo], seen.long_samples[slo]
    if burn is not None and sample is not None and burn >= law.severe_burn_ratio:
        return _beyond_alarm(burn, sample, cause, constants)
    if longer is None or longer.span_seconds < law.long_window_seconds:
        return Pressure(0.0, cause)
    long_burn = clamped_burn(longer, constants.slo, law)
    return _beyond_alarm(long_burn or 0.0, longer, cause, constants)


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

    The queue asks prefill first; decode too when the queue is long or prefill has nothing left. A
    phase at its floor passes its own violation on, since prefill and decode share the engine.
    """
    own = {phase: latency_pressure(phase, state, seen, constants) for phase in state.phases}
    queue = queue_pressure(state, constants)
    prefill, decode = state.phases["prefill"], state.phases["decode"]
    prefill_asks, decode_asks = [own["prefill"], queue], [own["decode"]]
    long_queue = queue.excess + 1.0 >= constants.law.queue_decode_ratio
    if at_floor("prefill", prefill.position, constants):
        decode_asks += [own["prefill"], queue]
    elif long_queue:
        decode_asks.append(queue)
    if at_floor("decode", decode.position, constants):
        prefill_asks.append(own["decode"])
    return {"prefill": max(prefill_asks, key=_excess), "decode": max(decode_asks, key=_excess)}


def at_floor(phase: Phase, position: float, constants: LawConstants) -> bool:
    """Tell whether this phase has nothing left to give up."""
    budgets = constants.ranges[phase]
    return budgets.budget(position) == budgets.floor


def _excess(pressure: Pressure) -> float:
    return pressure.excess
