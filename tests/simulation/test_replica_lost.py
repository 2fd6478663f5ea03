"""Fleets that lose a replica: what becomes of its requests, and that the others' loops answer."""

from dataclasses import replace
from pathlib import Path

import pytest
from small_worlds import FLOOR, FULL, make_plant, make_workload
from typer.testing import CliRunner

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.cli import app
from sglang_alloc_controller.cli_replicas import Fleets, checked, simulate_fleets, table
from sglang_alloc_controller.samples import PHASES
from sglang_alloc_controller.simulator.deployment import read_deployment
from sglang_alloc_controller.simulator.replica_scores import FleetScore
from sglang_alloc_controller.simulator.replicas import (
    FOR_GOOD,
    LEAST_REQUESTS,
    NEVER,
    REPLACED,
    ROUND_ROBIN,
    Fleet,
    run_fleet,
    serve,
)
from sglang_alloc_controller.simulator.workload import poisson_workload
from sglang_alloc_controller.simulator.world import World

PAIR = Fleet(2, ROUND_ROBIN, 1.0, 9.0, 1, controlled=False)
"""Of 9 s: the first replica dies at 3 s, and another takes its place at 6 s."""


@pytest.fixture(scope="module")
def world() -> World:
    return read_deployment().world


@pytest.fixture(scope="module")
def small_world(world: World) -> World:
    """A request of 100 prompt and 21 output tokens takes 0.1 + 20 times 0.01 s."""
    return replace(
        world, plant=make_plant(), ranges={phase: BudgetRange(FLOOR, FULL) for phase in PHASES}
    )


def _served(
    world: World, fleet: Fleet, *arrivals: float, output_tokens: int = 21
) -> tuple[float, float]:
    score = serve(world, fleet, make_workload(*((one, 100, output_tokens) for one in arrivals)))
    return score.requests_answered, score.requests_lost


def test_what_a_replica_holds_when_it_dies_is_lost(small_world: World) -> None:
    """The dead replica's are the first, the third and the fifth; one takes it 0.3 s."""
    fleet = PAIR._replace(lost=FOR_GOOD)
    running_and_waiting = (0.25, 0.75, 2.75, 2.85, 2.95, 3.25, 3.75)
    assert _served(small_world, fleet, *running_and_waiting) == (5, 2)
    assert _served(small_world, PAIR, *running_and_waiting) == (7, 0)
    answered_in_time = (0.25, 0.75, 2.65, 2.85, 3.25, 3.75)
    assert _served(small_world, fleet, *answered_in_time) == (6, 0)


def test_a_dead_replica_is_sent_its_turns_until_it_is_noticed(small_world: World) -> None:
    arrivals = (3.15, 3.25, 3.35, 3.45, 3.85, 3.95, 4.15, 4.25)
    noticed = [
        _served(small_world, PAIR._replace(lost=FOR_GOOD, unnoticed_seconds=seconds), *arrivals)
        for seconds in (0.0, 0.5, 1.0, 2.5)
    ]
    assert noticed == [(8, 0), (6, 2), (5, 3), (4, 4)]


def test_a_dead_replica_has_the_least_requests_of_all(small_world: World) -> None:
    """Each takes 3.1 s. The dead one's first is lost, and what comes in the second without notice
    while the other is busy from 2.95 on.
    """
    fleet = PAIR._replace(balancer=LEAST_REQUESTS, lost=FOR_GOOD, unnoticed_seconds=1.0)
    arrivals = (0.25, 2.95, 3.15, 3.35, 3.55, 3.75, 3.95, 4.15, 4.35)
    assert _served(small_world, fleet, *arrivals, output_tokens=301) == (3, 6)


def test_a_new_replica_takes_its_turns_at_two_thirds(small_world: World) -> None:
    """First tokens of eight at once: at 6.35, two at 6.55 and, four running at most, at 6.65; the
    other four wait for a second. Of four at each of two replicas none waits.
    """
    at_once = (6.25, 6.26, 6.27, 6.28, 6.29, 6.295, 6.31, 6.32)
    requests = make_workload(*((second, 100, 101) for second in (1.25, *at_once)))
    gone, replaced = (
        serve(small_world, PAIR._replace(lost=lost), requests) for lost in (FOR_GOOD, REPLACED)
    )
    assert (replaced.requests_answered, replaced.requests_lost) == (9, 0)
    assert (gone.requests_answered, gone.requests_lost) == (9, 0)
    assert replaced.attainment_after == 1.0
    assert gone.attainment_after == pytest.approx(4 / 8)


def test_attainment_is_told_of_each_third_and_of_what_was_answered(small_world: World) -> None:
    """One at a time is in time; of eight that come at once to one replica the last ones are not."""
    at_once = tuple(4.21 + 0.01 * number for number in range(8))
    requests = make_workload(*((second, 100, 21) for second in (1.25, 2.95, *at_once, 7.25)))
    fleet = PAIR._replace(lost=FOR_GOOD, balancer=LEAST_REQUESTS)
    score = serve(small_world, fleet, requests)
    assert (score.attainment_before, score.attainment_after) == (1.0, 1.0)
    assert score.attainment_during < 1.0
    late = 1.0 - score.slo_attainment_ratio
    assert late == pytest.approx((1.0 - score.attainment_during) * 9 / score.requests_answered)


@pytest.mark.parametrize("balancer", [ROUND_ROBIN, LEAST_REQUESTS])
@pytest.mark.parametrize("lost", [NEVER, FOR_GOOD, REPLACED])
@pytest.mark.parametrize("unnoticed", [0.0, 10.0])
def test_every_request_is_answered_or_lost_once(
    world: World, balancer: str, lost: str, unnoticed: float
) -> None:
    fleet = Fleet(3, balancer, 1.2, 120.0, 4, False, lost, unnoticed)
    rate = 3 * world.capacities.at(1.2)
    sent = len(poisson_workload(lambda _: rate, rate, 120.0, lambda _: world.mix, 4))
    score = run_fleet(world, fleet)
    assert score.requests_answered + score.requests_lost == sent
    assert (score.requests_lost > 0) == (lost != NEVER)
    assert run_fleet(world, fleet) == score


def test_the_one_that_is_left_gives_up_quality_until_it_is_joined(world: World) -> None:
    fleet = Fleet(2, LEAST_REQUESTS, 0.66, 1800.0, 1, lost=REPLACED)
    score = run_fleet(world, fleet)
    assert score.position_before > 0.95
    assert score.position_during < 0.8
    assert score.position_after > score.position_during + 0.1
    assert score.loss_before < score.loss_during > score.loss_after
    full = run_fleet(world, fleet._replace(controlled=False))
    assert full.attainment_during < 0.5
    assert score.attainment_during > 0.9
    assert score.attainment_before == full.attainment_before


def test_a_fleet_that_lost_a_replica_is_kept_and_told(tmp_path: Path, world: World) -> None:
    asked = Fleets([2], [ROUND_ROBIN], [0.3], 180.0, [1], [NEVER, FOR_GOOD, REPLACED], [0.0, 10.0])
    first = simulate_fleets(world, asked, tmp_path, 1, _quiet)
    # Of five: to lose none in 10 s is to lose none at once.
    assert len((tmp_path / "replicas.csv").read_text().splitlines()) == 1 + 2 * 5

    def fails(share: float, left: str) -> None:
        raise AssertionError("nothing is left to simulate")

    again = simulate_fleets(world, asked, tmp_path, 1, fails)
    for fleet, score in first.items():
        assert FleetScore(*again[fleet]) == pytest.approx(score, rel=1e-5, nan_ok=True)
    assert "| never | 0 |" in table(again)
    assert "| replaced, noticed after 10 s |" in table(again)


def _quiet(share: float, left: str) -> None:
    pass


def test_a_loss_that_leaves_none_or_is_never_noticed_is_refused() -> None:
    alone = Fleets([1], [ROUND_ROBIN], [1.0], 180.0, [1], [FOR_GOOD])
    with pytest.raises(ConfigurationError, match=r"A fleet of 1 .* has none left"):
        checked(alone)
    assert checked(alone._replace(losses=[NEVER])).losses == [NEVER]
    late = alone._replace(replicas=[2], unnoticed_seconds=[60.0])
    with pytest.raises(ConfigurationError, match=r"unnoticed for 60 s.*below 60 s"):
        checked(late)
    with pytest.raises(ConfigurationError, match=r"no loss of a replica 'maybe'.*for-good"):
        checked(late._replace(losses=["maybe"]))


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf"])
def test_a_time_without_notice_that_is_none_is_refused(seconds: str) -> None:
    result = CliRunner().invoke(app, ["simulate-replicas", "--unnoticed", seconds])
    assert result.exit_code == 2
    assert "--unnoticed" in result.output


def test_the_command_refuses_a_loss_that_it_does_not_know() -> None:
    result = CliRunner().invoke(app, ["simulate-replicas", "--lost", "often"])
    assert result.exit_code == 2
    assert "Choose among never, for-good, replaced" in result.output
