"""Control story, third step: which loads were too much for which positions. Pure.

A violation at position p under a load of r requests per second says that p and every position above
it fail under r and every larger load. It is believed for a while, `backoff_factor` times longer
each time that it fails again, and then the position is tried once per `trial_seconds`. It is gone
back to at once when the load is surely below `relief_ratio` * r, and the memory is dropped when
the position has borne a load that is surely larger.

    surely below   (n + z * sqrt(n) + z^2) / T for a Poisson count n in T seconds, the smallest over
                   the windows at hand: a short one tells a large fall soon, a long one a small fall
    surely above   (n - z * sqrt(n)) / T over the long window
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from sglang_alloc_controller.law_state import Failure, LawConstants, PhaseState, Seen

_ROUNDING = 1e-9


def with_failure(
    phase: PhaseState, seen: Seen, wait_seconds: float, constants: LawConstants
) -> tuple[Failure, ...]:
    """Return the memory after the present position failed under the present load.

    `wait_seconds` is how long that is believed if it did not fail before.
    """
    law = constants.law
    before = [one.wait_seconds for one in phase.failures if _same_position(one, phase)]
    wait_seconds = max([wait_seconds, *(law.backoff_factor * wait for wait in before)])
    wait_seconds = min(wait_seconds, law.backoff_max_seconds)
    rate = max(_rates(seen, constants), key=lambda window: window[1])[0]
    new = Failure(phase.position, rate, seen.now_seconds + wait_seconds, wait_seconds)
    return (*(one for one in phase.failures if not _same_position(one, phase)), new)


def with_present_load(phase: PhaseState, seen: Seen, constants: LawConstants) -> PhaseState:
    """Take the load of the newest window into the memory.

    While nothing has moved since a step down, that step's failure takes the highest load seen: an
    overloaded server answers fewer requests than arrive. What the load has disproved is dropped.
    """
    load = seen.event_rates["ttft"]
    failures = phase.failures
    if failures and phase.step < 0:
        newest = failures[-1]._replace(
            rate_per_second=max(failures[-1].rate_per_second, load)
        )  # fmt: skip
        failures = (*failures[:-1], newest)
    if seen.now_seconds - phase.changed_at_seconds > constants.law.trial_seconds:
        borne = _lower_bound(load, constants)
        failures = tuple(
            one
            for one in failures
            if one.position > phase.position + _ROUNDING or one.rate_per_second >= borne
        )
    return phase if failures == phase.failures else replace(phase, failures=failures)


def is_blocked(
    phase: PhaseState, position: float, seen: Seen, constants: LawConstants
) -> bool:  # fmt: skip
    """Tell whether `position` is remembered to fail under a load like the present one.

    Positions less than a step below a failed one are taken to fail too, and so are all of them
    while the phase is where a step down has left it.
    """
    law = constants.law
    since_change_seconds = seen.now_seconds - phase.changed_at_seconds
    on_trial = phase.step > 0 and since_change_seconds < law.trial_seconds
    just_lowered = phase.failures[-1:] if phase.step < 0 else ()
    limits = [
        one.rate_per_second
        for one in phase.failures
        if (one in just_lowered or one.position <= position + law.restore_step_max - _ROUNDING)
        and (on_trial or seen.now_seconds < one.until_seconds)
    ]
    if not limits:
        return False
    return load_bound(seen, constants) >= law.relief_ratio * min(limits)


def load_bound(seen: Seen, constants: LawConstants) -> float:
    """Return the requests per second that the load surely does not exceed."""
    sigmas = constants.law.confidence_sigmas
    return min(
        (events + sigmas * math.sqrt(events) + sigmas**2) / seconds
        for events, seconds in (
            (rate * seconds, seconds) for rate, seconds in _rates(seen, constants)
        )
    )


def _rates(seen: Seen, constants: LawConstants) -> list[tuple[float, float]]:
    """Return (requests per second, seconds) of every window at hand."""
    windows: Iterable[tuple[float, float]] = (
        (sample.rate_per_second, sample.span_seconds)
        for sample in (seen.samples["ttft"], seen.long_samples["ttft"])
        if sample is not None and sample.span_seconds > 0
    )
    return [*windows, (seen.event_rates["ttft"], constants.law.long_window_seconds)]


def _lower_bound(rate: float, constants: LawConstants) -> float:
    seconds = constants.law.long_window_seconds
    events = rate * seconds
    return (events - constants.law.confidence_sigmas * math.sqrt(events)) / seconds


def _same_position(failure: Failure, phase: PhaseState) -> bool:
    return abs(failure.position - phase.position) <= _ROUNDING
