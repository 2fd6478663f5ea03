"""Simulator: many servers behind one balancer, each with a control loop of its own. Seeded.

A replica that gives up quality gets faster, and a balancer that watches outstanding requests then
sends it more: loops that do not know of each other could hand the load around for ever. Load and
capacity are per replica, so that every size of the fleet meets the same share of what it carries.

The balancer decides at the beginning of a slice of time for all requests that arrive in it; it
knows what it has sent and what was answered by then.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import NamedTuple

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.samples import PHASES
from sglang_alloc_controller.settings import Settings
from sglang_alloc_controller.simulator.engine import Engine
from sglang_alloc_controller.simulator.laws import Law, Order, OurLaw, StaticLaw
from sglang_alloc_controller.simulator.run_law import TICK_SECONDS, Scraper
from sglang_alloc_controller.simulator.scenarios import Faults
from sglang_alloc_controller.simulator.scores import within_slo
from sglang_alloc_controller.simulator.workload import Workload, poisson_workload
from sglang_alloc_controller.simulator.world import World

ROUND_ROBIN, LEAST_REQUESTS = "round-robin", "least-requests"
BALANCERS = (ROUND_ROBIN, LEAST_REQUESTS)
_SLICES_PER_TICK = 5  # of 0.1 s: a few requests of a replica at most
_HOUR_SECONDS = 3600.0


class Fleet(NamedTuple):
    """What is simulated: so many replicas, their balancer, and the load on each."""

    replicas: int
    balancer: str
    load: float
    """Of each replica, in the sense of `Capacities.at`: 1 is what one alone carries at full."""
    seconds: float
    seed: int
    controlled: bool = True
    """False: full quality always, to compare with."""


class FleetScore(NamedTuple):
    """What came of a fleet; the first third of the time is the way to where it settles."""

    slo_attainment_ratio: float
    mean_predicted_loss: float
    """Nats per generated token of all replicas."""
    changes_per_hour: float
    """Of the average replica, after the first third."""
    changes_per_hour_max: float
    """Of the replica with most of them."""
    position_spread: float
    """Standard deviation over the replicas of their mean position, 0 floor to 1 full quality."""
    load_spread: float
    """Standard deviation over the replicas of the requests each got, relative to their mean."""


@dataclass
class _Replica:
    engine: Engine
    law: Law
    scraper: Scraper
    order: Order
    sent: int = 0
    changes: int = 0
    position_sum: float = 0.0

    @property
    def outstanding(self) -> int:
        return self.sent - len(self.engine.outcomes)


def run_fleet(world: World, fleet: Fleet) -> FleetScore:
    """Run a fleet under constant Poisson load, then without arrivals until all is answered.

    Raises:
        ConfigurationError: no request arrives in this time.
    """
    rate = fleet.replicas * world.capacities.at(fleet.load)
    workload = poisson_workload(
        lambda _: rate, rate, fleet.seconds, lambda _: world.mix, fleet.seed
    )
    if not len(workload):
        raise ConfigurationError(
            f"At a load of {fleet.load:g} no request arrives in {fleet.seconds / 60:g} minutes. "
            "Raise --load or --minutes."
        )
    replicas = [_replica(world, fleet, number) for number in range(fleet.replicas)]
    positions = {phase: world.ranges[phase].position for phase in PHASES}
    slice_seconds = TICK_SECONDS / _SLICES_PER_TICK
    arrival = ticks = 0
    for number in range(round(fleet.seconds / slice_seconds)):
        now = number * slice_seconds
        for one in replicas:
            one.engine.advance(now)
        arrival = _dispatch(fleet, replicas, workload, arrival, now + slice_seconds)
        if number % _SLICES_PER_TICK:
            continue
        is_settled = now > fleet.seconds / 3
        ticks += is_settled
        for one in replicas:
            _tick(one, now, is_settled)
            if is_settled:
                one.position_sum += fmean(
                    positions[phase](budget)
                    for phase, budget in zip(PHASES, one.order.budgets, strict=True)
                )
    for one in replicas:
        while not one.engine.done:
            one.engine.advance(one.engine.now_seconds + 60.0)
    return _score(fleet, replicas, world.settings, ticks)


def _replica(world: World, fleet: Fleet, number: int) -> _Replica:
    """Return a replica at full quality; polls of different controllers fall at different times."""
    law: Law = (
        OurLaw(world.settings, world.ranges) if fleet.controlled else StaticLaw(world.ceiling)
    )
    first_poll = random.Random(f"{fleet.seed} {number}").random()
    return _Replica(
        Engine(Workload((), (), ()), world.plant, world.ceiling),
        law,
        Scraper(Faults(), fleet.seed + number, first_poll),
        Order(world.ceiling),
    )


def _dispatch(
    fleet: Fleet, replicas: Sequence[_Replica], workload: Workload, first: int, until: float
) -> int:
    """Send the requests from `first` on that arrive before `until`; return the next one."""
    number = first
    while number < len(workload) and workload.arrival_seconds[number] < until:
        if fleet.balancer == ROUND_ROBIN:
            chosen = replicas[number % len(replicas)]
        else:  # ties go round, or the first replica would always be the busiest
            turned = range(number, number + len(replicas))
            chosen = min(
                (replicas[turn % len(replicas)] for turn in turned), key=lambda one: one.outstanding
            )
        chosen.engine.offer(
            workload.arrival_seconds[number],
            workload.prompt_tokens[number],
            workload.output_tokens[number],
        )
        chosen.sent += 1
        number += 1
    return number


def _tick(one: _Replica, now: float, is_settled: bool) -> None:
    chosen = one.law.tick(now, one.scraper.at(now, one.engine))
    if chosen != one.order:
        one.order = chosen
        one.engine.set_budgets(*chosen.budgets, chosen.calm)
        one.changes += is_settled


def _score(
    fleet: Fleet, replicas: Sequence[_Replica], settings: Settings, ticks: int
) -> FleetScore:
    outcomes = [outcome for one in replicas for outcome in one.engine.outcomes]
    tokens = sum(one.engine.generated_tokens for one in replicas)
    hours = ticks * TICK_SECONDS / _HOUR_SECONDS
    changes = [one.changes / hours for one in replicas]
    sent = [one.sent for one in replicas]
    return FleetScore(
        slo_attainment_ratio=fmean(within_slo(one, settings.slo) for one in outcomes),
        mean_predicted_loss=sum(one.engine.loss_sum for one in replicas) / tokens,
        changes_per_hour=fmean(changes),
        changes_per_hour_max=max(changes),
        position_spread=pstdev(one.position_sum / ticks for one in replicas),
        load_spread=pstdev(sent) / fmean(sent),
    )
