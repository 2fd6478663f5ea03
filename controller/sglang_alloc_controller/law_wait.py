"""Control story, third step, forward: whether a change is worth it, and how long it waits. Pure.

    worth      the gain is at least load_worth_nats, and a share of the larger loss
    wait       the load is known for load_wait_factor times as long as at the last change: the
               changes under one load are ever further apart, about log(3600 s) / log(factor) of
               them in its first hour. It counts as new where the server has become slower or
               faster (law_steps)

Regimes of the wait:

    restless   the load is young, or loads of the last half hour kept changing, or an alarm: down at
               once, and what waits beyond the queue's SLO counts as arriving within
               load_drain_seconds; back as soon as the queue is gone
    alarm      somebody else has moved the budgets (staleness, idleness, a person), or a load that
               is not calm has a queue: restless for a while, with what is known of the load
    violation  late answers or a queue: down after a minute, or a quarter of the time known, and
               after ten minutes at most
    easy       a deep cut of which most is needless: back after two minutes, or half the time known
    settling   a cut under a load that changed less than five minutes ago: back as soon as it is
               known for twice as long as at the last change, since the first cuts insure against
               doubt
    drift      the rate has moved surely away from that of the last change, too slowly for a jump:
               after two minutes
    trend      the rate rises or falls steadily: after one minute
    start      without any change seen yet, nothing is given up in the first 15 seconds, and in the
               first half minute only for a violation: a rate from a handful of requests is none
"""

import math
from typing import NamedTuple

from sglang_alloc_controller.law_calm import Plan
from sglang_alloc_controller.law_state import (
    ForwardState,
    LawConstants,
    LawState,
    Reason,
    Seen,
    changed_at_seconds,
)

# So many peaks in the memory make the load restless.
PEAKS_RESTLESS = 2
_YOUNG_SECONDS = 45.0
# The smallest gain worth a change, as a share of the larger loss: of a small one, and of any.
_WORTH_SHARE, _WORTH_SHARE_MIN = 0.4, 0.15
_VIOLATION_WAIT_SECONDS, _DRAINED_WAIT_SECONDS = 60.0, 10.0
# At a start nothing is given up for so long, and then for so long only for a violation.
_FIRST_SECONDS, _START_SECONDS = 15.0, 30.0
# Longest time that a violation waits, under a load that has been the same for long.
_PATIENCE_SECONDS = 600.0
_EASY_LOSS, _EASY_SHARE, _EASY_WAIT_SECONDS = 0.02, 0.75, 120.0
# A slow load counts as another one from so many standard deviations on; it is followed so often.
_DRIFT_SIGMAS, _DRIFT_WAIT_SECONDS = 4.0, 120.0
# A load with so much evidence of a trend is followed so often: a constant one looks so about once
# in two thousand times.
_TREND_NATS, _TREND_WAIT_SECONDS = 6.0, 60.0
# A load settles for so long after a change; budgets that lose so much come back then each time it
# is known for so many times as long as at the last change. Less is not worth more changes.
_SETTLING_SECONDS, _SETTLING_FACTOR, _SETTLING_LOSS = 300.0, 2.0, 0.01
# A queue of so many times its SLO is an alarm, at most so often, while the load settles or has
# risen by so many standard deviations since the last change. Under a calm load it is chance, and
# each answer to it would be two changes.
_SURGE_QUEUES, _SURGE_PAUSE_SECONDS, _SURGE_SIGMAS = 1.5, 600.0, 2.0


class Look(NamedTuple):
    """What one reading says of the present budgets and of others."""

    now: Plan
    wanted: Plan
    gain: float
    """What the change would save, in loss and price of late answers, nats per token."""
    age_seconds: float
    """Of the load."""
    violating: bool = False
    """Whether late answers or a queue complain."""

    @property
    def down(self) -> bool:
        """Whether quality would be given up."""
        return self.wanted.loss > self.now.loss


def with_alarm(
    belief: ForwardState, taken_over: bool, state: LawState, seen: Seen, constants: LawConstants
) -> ForwardState:
    """Return the belief after looking for an alarm; `taken_over`: somebody else moved."""
    now = seen.reading_at_seconds
    queues = (state.queue_requests or 0.0) / constants.slo.queue_requests
    rested = now - belief.alarm_at_seconds >= _SURGE_PAUSE_SECONDS
    surges = queues >= _SURGE_QUEUES and rested and not _is_calm(belief, now)
    return belief._replace(alarm_at_seconds=now) if taken_over or surges else belief


def is_restless(belief: ForwardState, age_seconds: float) -> bool:
    """Tell whether the load is likely to change: then speed matters more than calm."""
    changed = belief.before_per_second is not None
    young = changed and age_seconds < _YOUNG_SECONDS
    return young or _is_alarmed(belief, age_seconds) or len(belief.peaks) >= PEAKS_RESTLESS


def refusal(
    belief: ForwardState, look: Look, state: LawState, seen: Seen, constants: LawConstants
) -> Reason | None:
    """Return why the budgets stay, or None."""
    law = constants.law
    largest = max(look.now.loss, look.wanted.loss)
    worth = max(min(law.load_worth_nats, _WORTH_SHARE * largest), _WORTH_SHARE_MIN * largest)
    same = (look.wanted.levels, look.wanted.calm) == (look.now.levels, look.now.calm)
    if same or look.gain < worth:
        at_floor = look.violating and max(look.now.levels) == 0
        return Reason.AT_FLOOR if at_floor else Reason.DEADBAND
    start_seconds = _FIRST_SECONDS if look.violating else _START_SECONDS
    if look.down and belief.before_per_second is None and look.age_seconds < start_seconds:
        return Reason.TOO_FEW_SAMPLES
    since_seconds = seen.now_seconds - changed_at_seconds(state)
    server_seconds = seen.reading_at_seconds - belief.server_since_seconds
    known_seconds = max(0.0, min(look.age_seconds, server_seconds) - since_seconds)
    if since_seconds < _wait_seconds(belief, look, known_seconds, constants):
        return Reason.HOLD
    waiting = (state.queue_requests or 0.0) / constants.slo.queue_requests
    if not look.down and waiting > law.queue_restore_ratio:
        return Reason.DRAINING
    return None


def _wait_seconds(
    belief: ForwardState, look: Look, known_seconds: float, constants: LawConstants
) -> float:
    """Return how long after the last change this waits: load and server were known so long then."""
    law = constants.law
    wait_seconds = (law.load_wait_factor - 1.0) * known_seconds
    if _is_alarmed(belief, look.age_seconds):
        wait_seconds = 0.0
    if _moved_sigmas(belief) > _DRIFT_SIGMAS:
        wait_seconds = min(wait_seconds, _DRIFT_WAIT_SECONDS)
    if belief.load is not None and belief.load.trend_nats > _TREND_NATS:
        wait_seconds = min(wait_seconds, _TREND_WAIT_SECONDS)
    if look.down:
        if is_restless(belief, look.age_seconds):
            wait_seconds = 0.0
        elif look.violating:
            patience = min(_PATIENCE_SECONDS, max(_VIOLATION_WAIT_SECONDS, known_seconds / 4))
            wait_seconds = min(wait_seconds, patience)
        return max(law.degrade_hold_seconds, wait_seconds)
    if look.now.loss >= _EASY_LOSS and look.gain >= _EASY_SHARE * look.now.loss:
        wait_seconds = min(wait_seconds, max(_EASY_WAIT_SECONDS, known_seconds / 2))
    if _is_settling(belief, look.age_seconds) and look.now.loss >= _SETTLING_LOSS:
        wait_seconds = min(wait_seconds, (_SETTLING_FACTOR - 1.0) * known_seconds)
    if belief.draining or len(belief.peaks) >= PEAKS_RESTLESS:
        wait_seconds = min(wait_seconds, _DRAINED_WAIT_SECONDS)
    return max(law.restore_hold_seconds, wait_seconds)


def _is_alarmed(belief: ForwardState, age_seconds: float) -> bool:
    now = belief.load_since_seconds + age_seconds
    return now - belief.alarm_at_seconds < _YOUNG_SECONDS


def _is_settling(belief: ForwardState, age_seconds: float) -> bool:
    return belief.before_per_second is not None and age_seconds < _SETTLING_SECONDS


def _is_calm(belief: ForwardState, now_seconds: float) -> bool:
    """Tell whether the load has been the same for long and is what the budgets were chosen for."""
    now, then = belief.load, belief.chosen_for
    rises = now is not None and then is not None and now.rate_per_second > then.rate_per_second
    if rises and _moved_sigmas(belief) > _SURGE_SIGMAS:
        return False
    return not _is_settling(belief, now_seconds - belief.load_since_seconds)


def _moved_sigmas(belief: ForwardState) -> float:
    """Return how far the rate is from that of the last change, in standard deviations."""
    now, then = belief.load, belief.chosen_for
    if now is None or then is None:
        return 0.0
    moved_by = abs(now.rate_per_second - then.rate_per_second)
    return moved_by / math.sqrt(now.variance + then.variance)
