"""Simulator, rivals: what can be done by those who know the arrivals. Pure.

The oracle looks ahead on a copy of the engine. Every `interval_seconds` it takes the pair of
budgets with the smallest predicted loss that keeps the objective over the next `horizon_seconds`;
if none does, the one that keeps most requests within the SLOs. It chooses among the same
budgets as our law. Several horizons are tried; the oracle is the smallest loss among those whose
attainment is within half a percentage point of the best of them. It keeps the objective in every
stretch of a horizon's length, not only on the average of a run, where a long calm would pay for
a burst without any answer to it. It is a bound for a law that must wait and see, and no proven
optimum.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.simulator.engine import Engine, Outcome
from sglang_alloc_controller.simulator.laws import Budgets, Schedule, StaticLaw
from sglang_alloc_controller.simulator.run_law import Run, run_law
from sglang_alloc_controller.simulator.scenarios import Scenario
from sglang_alloc_controller.simulator.scores import Score, score, within_slo
from sglang_alloc_controller.simulator.workload import Workload
from sglang_alloc_controller.simulator.world import World

INTERVAL_SECONDS = 5.0
# A run is divided into this many intervals at most: a slow day is planned by the minute.
_INTERVALS_MAX = 1440
HORIZONS_SECONDS = (10.0, 30.0)
# Shares of prefill in the engine's time, and the time that a pair must save to be worth a try.
_PREFILL_SHARES = (0.3, 0.5, 0.7)
_WORTHWHILE = 0.02
_EQUAL_ATTAINMENT = 0.005


class Scored(NamedTuple):
    """A run and its score."""

    run: Run
    score: Score


def candidates(world: World) -> list[Budgets]:
    """Return the pairs of our law's budgets that are worth trying, the smallest loss first.

    A pair is worth it if no pair of less loss saves more time, for some share of prefill in the
    engine's time. The law's levels are about this fine; more cost the oracle time and gain nothing.
    """
    ranges = world.ranges
    pairs = sorted(
        (ranges["prefill"].losses[i] + ranges["decode"].losses[j], i, j)
        for i in range(len(ranges["prefill"].levels))
        for j in range(len(ranges["decode"].levels))
    )
    worth: set[tuple[float, int, int]] = set()
    for share in _PREFILL_SHARES:
        fastest = math.inf
        for loss, i, j in pairs:
            seconds = share * _relative(ranges["prefill"], i)
            seconds += (1 - share) * _relative(ranges["decode"], j)
            if seconds < fastest * (1 - _WORTHWHILE):
                fastest = seconds
                worth.add((loss, i, j))
    return [(ranges["prefill"].levels[i], ranges["decode"].levels[j]) for _, i, j in sorted(worth)]


def _relative(budgets: BudgetRange, level: int) -> float:
    return budgets.seconds[level] / budgets.seconds[-1]


def best_static(world: World, scenario: Scenario, workload: Workload, seed: int) -> Scored:
    """Return the run of the best pair of constant budgets in hindsight.

    That is the smallest loss that keeps the objective on the average of the run; where none does,
    the largest attainment. Few runs are held at a time, since one of a day is some 100 MB.
    """
    objective_ratio = world.settings.slo.objective_ratio
    runs = (
        run_law(StaticLaw(pair), scenario, workload, world.plant, seed)
        for pair in candidates(world)
    )
    return max(
        (_scored(world, scenario, run) for run in runs),
        key=lambda one: (
            min(objective_ratio, one.score.slo_attainment_ratio),
            -one.score.mean_predicted_loss,
        ),
    )


def oracle(world: World, scenario: Scenario, workload: Workload, seed: int) -> Scored:
    """Return the run of the oracle."""
    found = []
    for horizon_seconds in HORIZONS_SECONDS:
        law = plan(world, scenario, workload, horizon_seconds)
        run = run_law(law, scenario, workload, world.plant, seed)
        found.append(_scored(world, scenario, run))
    best = max(one.score.slo_attainment_ratio for one in found)
    return _cheapest(found, best - _EQUAL_ATTAINMENT)


def _cheapest(found: list[Scored], attainment_ratio: float) -> Scored:
    enough = [one for one in found if one.score.slo_attainment_ratio >= attainment_ratio]
    return min(enough, key=lambda one: one.score.mean_predicted_loss)


def plan(world: World, scenario: Scenario, workload: Workload, horizon_seconds: float) -> Schedule:
    """Choose the budgets of every interval by looking ahead."""
    pairs = candidates(world)
    engine = Engine(workload, world.plant, world.ceiling)
    restarts = list(scenario.restarts)
    chosen: list[Budgets] = []
    interval_seconds = max(INTERVAL_SECONDS, scenario.seconds / _INTERVALS_MAX)
    ahead_seconds = max(horizon_seconds, 1.5 * interval_seconds)
    now = 0.0
    while now < scenario.seconds:
        if restarts and now >= restarts[0][0]:
            engine.restart(restarts.pop(0)[1])
        engine.slowdown_ratio = scenario.slowdown(now)
        pair = _choice(world, engine, pairs, now + ahead_seconds)
        chosen.append(pair)
        engine.set_budgets(*pair)
        now += interval_seconds
        engine.advance(now)
        engine.outcomes.clear()
    return Schedule(interval_seconds, tuple(chosen))


def _choice(world: World, engine: Engine, pairs: list[Budgets], until_seconds: float) -> Budgets:
    best, best_ratio = pairs[0], -1.0
    for pair in pairs:
        ahead = engine.clone()
        ahead.set_budgets(*pair)
        ahead.advance(until_seconds)
        ratio = _kept_ratio(world, ahead.outcomes, ahead.late_requests(_ttft(world)))
        if ratio >= world.settings.slo.objective_ratio:
            return pair
        if ratio > best_ratio:
            best, best_ratio = pair, ratio
    return best


def _ttft(world: World) -> float:
    return world.settings.slo.ttft_seconds or float("inf")


def _kept_ratio(world: World, outcomes: Iterable[Outcome], late: int) -> float:
    kept = [within_slo(one, world.settings.slo) for one in outcomes]
    return sum(kept) / (len(kept) + late) if kept or late else 1.0


def _scored(world: World, scenario: Scenario, run: Run) -> Scored:
    return Scored(run, score(run, world.plant, world.settings_for(scenario).slo))
