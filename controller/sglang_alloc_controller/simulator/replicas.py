"""Simulator: many servers behind one balancer, each with a control loop of its own. Seeded.

A replica that gives up quality gets faster, and a balancer that watches outstanding requests then
sends it more: loops that do not know of each other could hand the load around for ever. Load and
capacity are per replica, so that every size of the fleet meets the same share of what it carries.

The balancer decides at the beginning of a slice of time for all requests that arrive in it; it
knows what it has sent and what was answered by then.

A replica may die, as a pod does in Kubernetes: its connections are reset, and nobody sends its
requests again, since their answers have begun or may have. Until the balancer has noticed, the dead
pod refuses at once what it is sent, and that is lost too; a balancer that counts outstanding
requests sees no replica with fewer. The pod that takes its place has a new engine, a new controller
at full quality, and its own second 0.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.samples import PHASES, Phase
from sglang_alloc_controller.simulator.engine import Engine
from sglang_alloc_controller.simulator.laws import Law, Order, OurLaw, StaticLaw
from sglang_alloc_controller.simulator.replica_scores import FleetScore, Left, Mark, fleet_score
from sglang_alloc_controller.simulator.run_law import TICK_SECONDS, Scraper
from sglang_alloc_controller.simulator.scenarios import Faults
from sglang_alloc_controller.simulator.workload import Workload, poisson_workload
from sglang_alloc_controller.simulator.world import World

ROUND_ROBIN, LEAST_REQUESTS = "round-robin", "least-requests"
BALANCERS = (ROUND_ROBIN, LEAST_REQUESTS)
NEVER, FOR_GOOD, REPLACED = "never", "for-good", "replaced"
LOSSES = (NEVER, FOR_GOOD, REPLACED)
_SLICES_PER_TICK = 5  # of 0.1 s: a few requests of a replica at most


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
    lost: str = NEVER
    """Of `LOSSES`: whether a replica dies at one third of the time, and whether another takes its
    place at two thirds."""
    unnoticed_seconds: float = 0.0
    """How long the balancer goes on sending to the dead replica."""


@dataclass(eq=False)
class _Replica:
    engine: Engine
    law: Law
    scraper: Scraper
    order: Order
    started_seconds: float
    alive: bool = True
    sent: int = 0
    refused: int = 0
    changes: int = 0
    position: float = 1.0
    position_sum: float = 0.0
    settled_ticks: int = 0

    @property
    def outstanding(self) -> int:
        return self.sent - self.refused - len(self.engine.outcomes)

    def offer(self, arrival_seconds: float, prompt_tokens: int, output_tokens: int) -> None:
        self.sent += 1
        if self.alive:
            self.engine.offer(arrival_seconds - self.started_seconds, prompt_tokens, output_tokens)
        else:
            self.refused += 1

    def advance(self, now: float) -> None:
        if self.alive:
            self.engine.advance(now - self.started_seconds)

    def die(self) -> None:
        self.engine.restart(self.engine.now_seconds)
        self.alive = False

    def finish(self) -> None:
        while not self.engine.done:
            self.engine.advance(self.engine.now_seconds + 60.0)


class _Roster:
    """Every replica that there ever was, and those that the balancer sends to."""

    def __init__(self, world: World, fleet: Fleet) -> None:
        self._world, self._fleet = world, fleet
        self.replicas = [_replica(world, fleet, number, 0.0) for number in range(fleet.replicas)]
        self.targets = list(self.replicas)
        self.staying = self.replicas[fleet.lost != NEVER :]
        third, noticed = fleet.seconds / 3, fleet.seconds / 3 + fleet.unnoticed_seconds
        plan: list[tuple[float, Callable[[float], None]]] = []
        if fleet.lost != NEVER:
            plan += [(third, self._die), (noticed, self._leave)]
        if fleet.lost == REPLACED:
            plan.append((2 * third, self._join))
        self._plan = deque(plan)

    def advance(self, now: float) -> None:
        """Let time pass, and let happen what is due."""
        for one in self.replicas:
            one.advance(now)
        while self._plan and self._plan[0][0] <= now:
            self._plan.popleft()[1](now)

    def _die(self, now: float) -> None:
        self.replicas[0].die()

    def _leave(self, now: float) -> None:
        self.targets.remove(self.replicas[0])

    def _join(self, now: float) -> None:
        newcomer = _replica(self._world, self._fleet, len(self.replicas), now)
        self.replicas.append(newcomer)
        self.targets.append(newcomer)


def run_fleet(world: World, fleet: Fleet) -> FleetScore:
    """Run a fleet under constant Poisson load, then without arrivals until all is answered.

    Raises:
        ConfigurationError: no request arrives in this time, or the fleet cannot lose a replica so.
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
    return serve(world, refused_if_impossible(fleet), workload)


def refused_if_impossible(fleet: Fleet) -> Fleet:
    """Return the fleet; raises ConfigurationError if it cannot lose a replica as it is to."""
    if fleet.lost == NEVER:
        return fleet
    if fleet.replicas < 2:
        raise ConfigurationError(
            f"A fleet of {fleet.replicas} that loses a replica has none left. Take --replicas of 2 "
            f"or more, or --lost {NEVER}."
        )
    if not 0 <= fleet.unnoticed_seconds < fleet.seconds / 3:
        raise ConfigurationError(
            f"A replica that is dead from one third of {fleet.seconds / 60:g} minutes on cannot go "
            f"unnoticed for {fleet.unnoticed_seconds:g} s: another takes its place at two thirds. "
            f"Choose an --unnoticed below {fleet.seconds / 3:g} s, or more --minutes."
        )
    return fleet


def serve(world: World, fleet: Fleet, workload: Workload) -> FleetScore:
    """Run a fleet with these requests; its load counts for nothing."""
    roster = _Roster(world, fleet)
    slice_seconds = TICK_SECONDS / _SLICES_PER_TICK
    marks: list[Mark] = []
    arrival = 0
    for number in range(round(fleet.seconds / slice_seconds)):
        now = number * slice_seconds
        roster.advance(now)
        arrival = _dispatch(fleet, roster.targets, workload, arrival, now + slice_seconds)
        if number % _SLICES_PER_TICK:
            continue
        for one in roster.replicas:
            if one.alive:
                _tick(one, now, world.ranges, is_settled=now > fleet.seconds / 3)
        marks.append(_mark(now, roster.staying))
    for one in roster.replicas:
        one.finish()
    left = [_left(one, one in roster.staying) for one in roster.replicas]
    return fleet_score(left, marks, fleet.seconds, world.settings.slo)


def _replica(world: World, fleet: Fleet, number: int, started_seconds: float) -> _Replica:
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
        started_seconds,
    )


def _dispatch(
    fleet: Fleet, targets: Sequence[_Replica], workload: Workload, first: int, until: float
) -> int:
    """Send the requests from `first` on that arrive before `until`; return the next one."""
    number = first
    while number < len(workload) and workload.arrival_seconds[number] < until:
        if fleet.balancer == ROUND_ROBIN:
            chosen = targets[number % len(targets)]
        else:  # ties go round, or the first replica would always be the busiest
            turned = range(number, number + len(targets))
            chosen = min(
                (targets[turn % len(targets)] for turn in turned), key=lambda one: one.outstanding
            )
        chosen.offer(
            workload.arrival_seconds[number],
            workload.prompt_tokens[number],
            workload.output_tokens[number],
        )
        number += 1
    return number


def _tick(
    one: _Replica, now: float, ranges: Mapping[Phase, BudgetRange], *, is_settled: bool
) -> None:
    own_now = now - one.started_seconds
    chosen = one.law.tick(own_now, one.scraper.at(own_now, one.engine))
    if chosen != one.order:
        one.order = chosen
        one.engine.set_budgets(*chosen.budgets, chosen.calm)
        one.changes += is_settled
        one.position = fmean(
            ranges[phase].position(budget)
            for phase, budget in zip(PHASES, chosen.budgets, strict=True)
        )
    if is_settled:
        one.settled_ticks += 1
        one.position_sum += one.position


def _mark(now: float, staying: Sequence[_Replica]) -> Mark:
    return Mark(
        now,
        fmean(one.position for one in staying),
        sum(one.engine.loss_sum for one in staying),
        sum(one.engine.generated_tokens for one in staying),
    )


def _left(one: _Replica, stayed: bool) -> Left:
    engine, ticks = one.engine, one.settled_ticks
    return Left(
        stayed, engine.outcomes, one.started_seconds, one.sent, one.refused, engine.loss_sum,
        engine.generated_tokens, ticks * TICK_SECONDS, one.changes,
        one.position_sum / ticks if ticks else math.nan,
    )  # fmt: skip
