"""Those who know the arrivals: the oracle's plan and the best constant pair, on a small plant."""

from collections.abc import Sequence

import pytest
from small_worlds import FLOOR, FULL, make_plant, make_small_world, make_workload

from sglang_alloc_controller.simulator.law_names import FLOOR as FLOOR_LAW
from sglang_alloc_controller.simulator.law_names import FULL as FULL_LAW
from sglang_alloc_controller.simulator.law_names import run_named
from sglang_alloc_controller.simulator.laws import Budgets, Schedule, Scrape, StaticLaw
from sglang_alloc_controller.simulator.oracle import (
    INTERVAL_SECONDS,
    best_static,
    candidates,
    oracle,
    plan,
)
from sglang_alloc_controller.simulator.run_law import run_law
from sglang_alloc_controller.simulator.scenarios import Scenario
from sglang_alloc_controller.simulator.scores import Score, score
from sglang_alloc_controller.simulator.workload import Workload
from sglang_alloc_controller.simulator.world import World

AT_FULL, AT_FLOOR = (FULL, FULL), (FLOOR, FLOOR)
# At once they are too many for full quality: the fifth is answered after 0.64 s, at the floor the
# eighth after 0.42 s.
CLUMP = 8


@pytest.fixture(scope="module")
def world() -> World:
    return make_small_world()


def _scenario(seconds: float, *shares: tuple[float, float]) -> Scenario:
    """Arrivals at a share of the capacities from a second on, for each (second, share)."""
    steps = list(shares)

    def share(now: float) -> float:
        return next(value for second, value in reversed(steps) if second <= now)

    return Scenario(
        "short",
        seconds,
        lambda capacities, seed: lambda now: capacities.at(share(now)),
        max(value for _, value in steps),
    )


SILENT = (0.0, 0.0)


def _clump(at_seconds: float) -> Workload:
    """One request a second, and many at once."""
    calm = [(second + 0.5, 100, 5) for second in range(30)]
    return make_workload(*sorted([*calm, *[(at_seconds, 100, 5)] * CLUMP]))


def _static(world: World, scenario: Scenario, workload: Workload, pair: Budgets) -> Score:
    run = run_law(StaticLaw(pair), scenario, workload, world.plant, 1)
    return score(run, world.plant, world.settings.slo)


def _budgets_at(schedule: Schedule, seconds: Sequence[float]) -> list[Budgets]:
    return [schedule.tick(second, Scrape(None, 0)).budgets for second in seconds]


def test_candidates_go_from_full_quality_to_the_fastest_by_loss(world: World) -> None:
    pairs = candidates(world)
    losses = [world.plant.loss(pair) for pair in pairs]
    assert pairs[0] == AT_FULL
    assert pairs[-1] == AT_FLOOR
    assert losses == sorted(losses)
    assert len(set(pairs)) == len(pairs)


def test_a_pair_that_is_slower_than_one_of_less_loss_is_no_candidate() -> None:
    """Decode budgets lose much and save nothing here: they stay full."""
    plant = make_plant()
    flat = plant.times.decode._replace(seconds=((0.01, 0.01), (0.01, 0.01)))
    pairs = candidates(make_small_world(times=type(plant.times)(plant.times.prefill, flat, "flat")))
    assert pairs == [(prefill, FULL) for prefill in range(FULL, FLOOR - 1, -1)]


@pytest.mark.parametrize("share", [0.9, 1.6, 2.2])
def test_the_best_static_pair_is_the_cheapest_that_keeps_the_objective(
    world: World, share: float
) -> None:
    scenario = _scenario(150.0, (0.0, share))
    workload = scenario.workload(world.mix, world.capacities, 1)
    scores = {pair: _static(world, scenario, workload, pair) for pair in candidates(world)}
    keeping = [pair for pair, one in scores.items() if one.slo_attainment_ratio >= 0.95]
    cheapest = min(keeping, key=lambda pair: scores[pair].mean_predicted_loss)
    found = best_static(world, scenario, workload, 1)
    assert found.run.changes[-1].budgets == cheapest
    assert found.score.mean_predicted_loss == scores[cheapest].mean_predicted_loss
    assert (cheapest == AT_FULL) is (share == 0.9)


def test_where_no_pair_keeps_the_objective_the_best_one_keeps_most(world: World) -> None:
    scenario = _scenario(60.0, (0.0, 5.0))
    workload = scenario.workload(world.mix, world.capacities, 1)
    scores = [_static(world, scenario, workload, pair) for pair in candidates(world)]
    most = max(one.slo_attainment_ratio for one in scores)
    assert most < 0.95
    found = best_static(world, scenario, workload, 1).score
    assert found.slo_attainment_ratio == most
    assert found.mean_predicted_loss == min(
        one.mean_predicted_loss for one in scores if one.slo_attainment_ratio == most
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_the_oracle_keeps_more_than_full_quality_and_loses_less_than_the_floor(
    world: World, seed: int
) -> None:
    scenario = _scenario(120.0, (0.0, 0.5), (30.0, 2.0), (90.0, 0.5))
    workload = scenario.workload(world.mix, world.capacities, seed)
    found = oracle(world, scenario, workload, seed).score
    full, floor = (run_named(law, world, scenario, seed).score for law in (FULL_LAW, FLOOR_LAW))
    best = best_static(world, scenario, workload, seed).score
    assert full.slo_attainment_ratio < 0.9
    assert found.slo_attainment_ratio >= 0.95
    assert full.mean_predicted_loss == 0 < found.mean_predicted_loss
    assert found.mean_predicted_loss < best.mean_predicted_loss < floor.mean_predicted_loss


def test_the_oracle_gives_up_nothing_where_full_quality_keeps_the_objective(world: World) -> None:
    scenario = _scenario(120.0, (0.0, 0.3))
    workload = scenario.workload(world.mix, world.capacities, 1)
    found = oracle(world, scenario, workload, 1)
    assert found.score.mean_predicted_loss == 0.0
    assert found.score.slo_attainment_ratio >= 0.95


def test_a_plan_lowers_budgets_before_the_overload_and_takes_it_back(world: World) -> None:
    schedule = plan(world, _scenario(30.0, SILENT), _clump(17.3), horizon_seconds=10.0)
    before, at_clump, after = _budgets_at(schedule, (7.0, 15.0, 20.0))
    assert before == AT_FULL
    assert sum(at_clump) < sum(AT_FULL)  # from second 15 on, though nobody waits until 17.3
    assert after == AT_FULL
    without = plan(world, _scenario(30.0, SILENT), _clump(1000.0), horizon_seconds=10.0)
    assert set(_budgets_at(without, range(30))) == {AT_FULL}


def test_a_plan_keeps_the_requests_that_full_quality_makes_late(world: World) -> None:
    scenario, workload = _scenario(30.0, SILENT), _clump(17.3)
    schedule = plan(world, scenario, workload, horizon_seconds=10.0)
    planned = score(
        run_law(schedule, scenario, workload, world.plant, 1), world.plant, world.settings.slo
    )
    # At full quality four of the clump wait too long, and the one that comes behind them.
    full = _static(world, scenario, workload, AT_FULL)
    assert full.slo_attainment_ratio == pytest.approx(1 - 5 / 38)
    assert planned.slo_attainment_ratio >= 0.95
    assert 0 < planned.mean_predicted_loss < world.plant.loss(AT_FLOOR) / 2


def test_a_plan_chooses_every_five_seconds_and_for_a_day_every_minute(world: World) -> None:
    assert INTERVAL_SECONDS == 5.0
    workload = _clump(95.0)
    hour = plan(world, _scenario(7200.0, SILENT), workload, horizon_seconds=10.0)
    assert set(_budgets_at(hour, range(60, 85))) == {AT_FULL}
    assert len(set(_budgets_at(hour, range(95, 100)))) == 1
    assert _budgets_at(hour, [95.0]) != [AT_FULL]
    assert set(_budgets_at(hour, range(100, 120))) == {AT_FULL}
    day = plan(world, _scenario(86400.0, SILENT), workload, horizon_seconds=10.0)
    assert len(set(_budgets_at(day, range(60, 120)))) == 1
    assert _budgets_at(day, [60.0]) != [AT_FULL]
    assert set(_budgets_at(day, [*range(60), *range(120, 180)])) == {AT_FULL}
