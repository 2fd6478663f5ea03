"""Several servers behind one balancer: what each is sent, and that their loops come to rest."""

import os
from pathlib import Path

import pytest
from small_worlds import make_plant
from typer.testing import CliRunner

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller import cli_replicas
from sglang_alloc_controller.cli import app
from sglang_alloc_controller.cli_replicas import Fleets, checked, simulate_fleets, table
from sglang_alloc_controller.simulator import pool
from sglang_alloc_controller.simulator.deployment import read_deployment
from sglang_alloc_controller.simulator.engine import Engine
from sglang_alloc_controller.simulator.replicas import (
    LEAST_REQUESTS,
    ROUND_ROBIN,
    Fleet,
    run_fleet,
)
from sglang_alloc_controller.simulator.workload import Workload
from sglang_alloc_controller.simulator.world import World

NO_REQUESTS = Workload((), (), ())


@pytest.fixture(scope="module")
def world() -> World:
    return read_deployment().world


def _silent(share: float, left: str) -> None:
    assert 0 <= share <= 1
    assert left


def test_offered_requests_are_answered_like_known_ones() -> None:
    plant = make_plant()
    known = Engine(Workload((0.0, 0.05, 0.3), (100, 100, 50), (3, 2, 4)), plant, (10, 10))
    known.advance(9.0)
    offered = Engine(NO_REQUESTS, plant, (10, 10))
    offered.offer(0.0, 100, 3)
    offered.offer(0.05, 100, 2)
    offered.advance(0.2)
    assert not offered.done
    offered.offer(0.3, 50, 4)
    offered.advance(9.0)
    assert offered.outcomes == known.outcomes


def test_round_robin_sends_each_replica_as_much(world: World) -> None:
    score = run_fleet(world, Fleet(2, ROUND_ROBIN, 0.5, 180.0, 1, controlled=False))
    assert score.load_spread < 0.01
    assert score.changes_per_hour == 0
    assert score.mean_predicted_loss == 0


def test_least_requests_never_leaves_a_replica_idle_beside_a_queue(world: World) -> None:
    """At the load that one server alone cannot carry, the balanced pair does better."""
    alone, balanced = (
        run_fleet(world, Fleet(count, LEAST_REQUESTS, 1.1, 240.0, 1, controlled=False))
        for count in (1, 4)
    )
    assert balanced.slo_attainment_ratio > alone.slo_attainment_ratio


@pytest.mark.parametrize("balancer", [ROUND_ROBIN, LEAST_REQUESTS])
def test_loops_behind_a_balancer_come_to_rest(world: World, balancer: str) -> None:
    fleet = Fleet(4, balancer, 1.6, 1200.0, 3)
    controlled = run_fleet(world, fleet)
    full = run_fleet(world, fleet._replace(controlled=False))
    assert controlled.slo_attainment_ratio > full.slo_attainment_ratio
    assert controlled.slo_attainment_ratio > 0.97
    assert controlled.load_spread < 0.1
    # 13 minutes are counted, in which no budget moved more than twice and one moved once.
    assert controlled.changes_per_hour < 10
    assert controlled.changes_per_hour_max < 14


def test_finished_fleets_are_kept_and_others_added(tmp_path: Path, world: World) -> None:
    asked = Fleets([1], [ROUND_ROBIN], [0.3], 60.0, [1])
    first = simulate_fleets(world, asked, tmp_path, 1, _silent)
    kept = (tmp_path / "replicas.csv").read_text()
    assert len(kept.splitlines()) == 3

    def fails(share: float, left: str) -> None:
        raise AssertionError("nothing is left to simulate")

    again = simulate_fleets(world, asked, tmp_path, 1, fails)
    assert [score.slo_attainment_ratio for score in again.values()] == pytest.approx(
        [score.slo_attainment_ratio for score in first.values()]
    )
    assert "| 1 | round-robin | 0.3 | 100.00% | 100.00% |" in table(again)


def test_a_fleet_that_is_asked_for_twice_is_simulated_once() -> None:
    twice = Fleets([1, 1], [ROUND_ROBIN, ROUND_ROBIN], [0.3], 60.0, [1, 1])
    assert len(list(twice.every())) == 2


def test_progress_is_shown_while_nothing_is_finished_and_what_is_finished_is_kept(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person who interrupts the command raises just this, wherever it waits."""
    monkeypatch.setattr(pool, "_SHOW_SECONDS", 0.01)  # a worker process needs longer to start
    shares: list[float] = []

    def interrupt(share: float, left: str) -> None:
        shares.append(share)
        if share > 0:
            raise KeyboardInterrupt

    asked = Fleets([1, 2], [ROUND_ROBIN], [0.3], 180.0, [1])
    with pytest.raises(KeyboardInterrupt):
        simulate_fleets(world, asked, tmp_path, 1, interrupt)
    assert shares[0] == 0.0
    kept = (tmp_path / "replicas.csv").read_text().splitlines()[1:]
    assert 1 <= len(kept) < 4
    rest: list[float] = []
    simulate_fleets(world, asked, tmp_path, 1, lambda share, left: rest.append(share))
    again = (tmp_path / "replicas.csv").read_text().splitlines()[1:]
    assert len(again) == 4
    assert set(kept) <= set(again)


def test_a_worker_process_that_dies_is_told_in_a_sentence(world: World) -> None:
    with pytest.raises(ConfigurationError, match="worker process died"):
        list(pool.in_workers(world, _die, [1], cost=float, workers=1, progress=_silent))


def _die(world: World, asked: int) -> None:
    os._exit(3)


def test_a_folder_that_cannot_be_written_is_refused_before_the_simulation(
    tmp_path: Path, world: World
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")

    def fails(share: float, left: str) -> None:
        raise AssertionError("the simulation began")

    with pytest.raises(ConfigurationError, match=r"replicas\.csv cannot be written"):
        simulate_fleets(world, Fleets([1], [ROUND_ROBIN], [0.3], 60.0, [1]), blocked, 1, fails)


def test_a_load_without_a_request_is_refused(world: World) -> None:
    with pytest.raises(ConfigurationError, match=r"no request arrives in 0\.5 minutes"):
        run_fleet(world, Fleet(1, ROUND_ROBIN, 1e-6, 30.0, 1))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--load", "0"),
        ("--load", "nan"),
        ("--load", "inf"),
        ("--minutes", "inf"),
        ("--replicas", "0"),
        ("--seed", "-1"),
    ],
)
def test_numbers_that_mean_no_fleet_are_refused(arguments: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["simulate-replicas", *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_an_interrupted_command_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_replicas, "simulate_fleets", interrupted)
    result = CliRunner().invoke(app, ["simulate-replicas", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert "interrupted; what is finished is kept in" in result.output


def test_a_balancer_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigurationError, match="no balancer 'random'"):
        checked(Fleets([1], ["random"], [1.0], 60.0, [1]))
