"""Simulator, last step of a fleet: what its replicas left behind, as one line of numbers. Pure."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean, pstdev
from typing import NamedTuple

from sglang_alloc_controller.settings import SloSettings
from sglang_alloc_controller.simulator.engine import Outcome
from sglang_alloc_controller.simulator.scores import within_slo

_HOUR_SECONDS = 3600.0


class FleetScore(NamedTuple):
    """What came of a fleet; the first third of the time is the way to where it settles.

    Before, during and after are the thirds of the time: a replica is lost with the second.
    """

    slo_attainment_ratio: float
    """Of the requests that were answered."""
    mean_predicted_loss: float
    """Nats per generated token of all replicas."""
    changes_per_hour: float
    """Of the average replica, after the first third, in the time that it was there."""
    changes_per_hour_max: float
    """Of the replica with most of them."""
    position_spread: float
    """Standard deviation of their mean positions, 0 floor to 1 full quality, over the replicas
    that were there all the time."""
    load_spread: float
    """Standard deviation of the requests each of those got, relative to their mean."""
    requests_answered: float
    requests_lost: float
    """Every request is one or the other, once."""
    attainment_before: float
    """Of the requests that were answered in this third."""
    attainment_during: float
    attainment_after: float
    position_before: float
    """Mean over the same replicas of their position, in the later half of the third."""
    position_during: float
    position_after: float
    loss_before: float
    """Nats per generated token of the same replicas, in the later half of the third."""
    loss_during: float
    loss_after: float


class Mark(NamedTuple):
    """The replicas that are there all the time, at one tick."""

    seconds: float
    position: float
    """Mean over them."""
    loss_sum: float
    """Nats since the start, of all of them."""
    tokens: int
    """Generated since the start, by all of them."""


class Left(NamedTuple):
    """What one replica left behind."""

    stayed: bool
    """Whether it was there all the time."""
    outcomes: Sequence[Outcome]
    started_seconds: float
    """When its own second 0 was."""
    sent: int
    refused: int
    """Of those sent: came when it was dead."""
    loss_sum: float
    tokens: int
    settled_seconds: float
    """How long it was there after the first third."""
    changes: int
    """In that time."""
    mean_position: float
    """In that time; NaN: it was not there."""


def fleet_score(
    replicas: Sequence[Left], marks: Sequence[Mark], seconds: float, slo: SloSettings
) -> FleetScore:
    """Return the numbers of a fleet that got requests for so many seconds."""
    answered = list(_answered(replicas, slo))
    staying = [one for one in replicas if one.stayed]
    changes = [
        one.changes / (one.settled_seconds / _HOUR_SECONDS)
        for one in replicas
        if one.settled_seconds
    ]
    third = seconds / 3
    ends = [0.0, third, 2 * third, math.inf]
    thirds = [
        [kept for second, kept in answered if start <= second < end]
        for start, end in pairwise(ends)
    ]
    halves = [
        [mark for mark in marks if start + third / 2 <= mark.seconds < end]
        for start, end in pairwise(ends)
    ]
    sent = [one.sent for one in staying]
    return FleetScore(
        _mean([kept for _, kept in answered]),
        sum(one.loss_sum for one in replicas) / sum(one.tokens for one in replicas),
        fmean(changes),
        max(changes),
        pstdev(one.mean_position for one in staying),
        pstdev(sent) / fmean(sent),
        len(answered),
        sum(one.refused + sum(outcome.lost for outcome in one.outcomes) for one in replicas),
        *map(_mean, thirds),
        *(_mean([mark.position for mark in half]) for half in halves),
        *map(_loss, halves),
    )


def _answered(replicas: Iterable[Left], slo: SloSettings) -> Iterator[tuple[float, bool]]:
    """Yield when each answered request was finished, and whether it kept the SLOs."""
    for one in replicas:
        for outcome in one.outcomes:
            if not outcome.lost:
                yield outcome.finished_seconds + one.started_seconds, within_slo(outcome, slo)


def _mean(numbers: Sequence[float]) -> float:
    return fmean(numbers) if numbers else math.nan


def _loss(marks: Sequence[Mark]) -> float:
    """Return the nats per token between the first of these marks and the last."""
    if not marks or marks[-1].tokens == marks[0].tokens:
        return math.nan
    return (marks[-1].loss_sum - marks[0].loss_sum) / (marks[-1].tokens - marks[0].tokens)
