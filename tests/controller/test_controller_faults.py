"""Faults on real processes: no budget outside its bounds, and a state that an operator can read."""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from controller_process import ControllerProcess, running, write_config
from envoy_proxy import proxying
from loads_answers import answer, rank
from stand_in_server import StandInServer, serving
from virtual_loop import publish_table

from sglang_alloc.shared_table import SharedTable

FULL = (48, 48)
FLOOR = 24
QUALITY = {"prefill_floor_budget": FLOOR, "decode_floor_budget": FLOOR}


@pytest.fixture
def table(tmp_path: Path) -> SharedTable:
    publish_table(tmp_path / "t.tbl")
    return SharedTable.open(tmp_path / "t.tbl")


@pytest.fixture
def server(recorded: Path) -> Iterator[StandInServer]:
    with serving((recorded / "first.txt").read_text()) as server:
        yield server


def _lower(controller: ControllerProcess, server: StandInServer, table: SharedTable) -> None:
    """Bring the controller to give up quality."""
    controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
    server.page = (Path(__file__).parent / "recorded" / "burst.txt").read_text()
    controller.wait_for(lambda: max(table.selector()[1:]) < 48, "a lower budget")


def _is_full(table: SharedTable) -> bool:
    return tuple(table.selector()[1:]) == FULL


def test_a_hung_scheduler_behind_a_healthy_http_server_leads_to_full_quality(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    server.loads = answer(rank(num_waiting_reqs=20))
    with running(write_config(tmp_path, server.url, quality=QUALITY)) as controller:
        _lower(controller, server, table)
        assert min(table.selector()[1:]) >= FLOOR
        server.loads = answer(rank(age_seconds=60.0, num_waiting_reqs=20))
        controller.wait_for(lambda: controller.is_in_state("stale"), "stale input")
        controller.wait_for(lambda: _is_full(table), "full quality")


def test_a_server_that_comes_back_with_another_model_is_a_start_and_is_told(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    with running(write_config(tmp_path, server.url)) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        server.page = server.page.replace('model_name="tiny-moe"', 'model_name="other"')
        controller.wait_for(lambda: "model_changed" in controller.log(), "the change")
        restarts = "sglang_alloc_controller_engine_restarts_total 1.0"
        controller.wait_for(lambda: controller.has(restarts), "the start")
        assert _is_full(table)


def test_a_series_that_vanishes_is_named_and_makes_the_input_stale(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    with running(write_config(tmp_path, server.url)) as controller:
        _lower(controller, server, table)
        server.page = server.page.replace("num_queue_reqs", "num_waiting_reqs")
        controller.wait_for(lambda: controller.is_in_state("stale"), "stale input")
        controller.wait_for(lambda: _is_full(table), "full quality")
        assert "hold no sglang:num_queue_reqs" in controller.log()


def test_a_full_disk_costs_the_log_its_lines_and_nothing_else(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    log = {"path": "/dev/full", "every_tick": True}
    with running(write_config(tmp_path, server.url, decision_log=log)) as controller:
        _lower(controller, server, table)
        controller.wait_for(lambda: controller.value("decision_log_errors_total") > 3, "lost lines")
        assert controller.has("sglang_alloc_controller_tick_errors_total 0.0")
        assert controller.stop() == 0
    assert _is_full(table)


def test_a_deleted_table_stays_in_use_and_is_given_back_at_full_quality(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    with running(write_config(tmp_path, server.url)) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        (tmp_path / "t.tbl").unlink()
        _lower(controller, server, table)
        assert controller.stop() == 0
    assert _is_full(table)


def test_sigkill_at_any_moment_leaves_budgets_within_bounds_and_a_table_for_the_next(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    config, moments = write_config(tmp_path, server.url, quality=QUALITY), random.Random(5)
    with running(config) as controller:
        _lower(controller, server, table)
        assert controller.stop(signal.SIGKILL) == -signal.SIGKILL
    for _ in range(3):
        with running(config) as controller:
            time.sleep(moments.uniform(0.2, 1.2))
            controller.stop(signal.SIGKILL)
        assert all(FLOOR <= budget <= 48 for budget in table.selector()[1:])
        assert table.is_intact()
    with running(config) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        assert controller.stop() == 0
    assert _is_full(table)


def test_delays_and_aborts_of_a_proxy_make_the_input_stale_and_are_survived(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    server.loads = answer(rank(num_waiting_reqs=20))
    with proxying(tmp_path, server.port) as envoy:
        source = {"url": envoy.url, "poll_seconds": 0.1, "timeout_seconds": 1.0}
        with running(write_config(tmp_path, envoy.url, source=source)) as controller:
            for faults, problem in (
                ({"aborted_percent": 100}, "status 503"),
                ({"delayed_percent": 100}, "did not answer within 1.0 s"),
            ):
                _lower(controller, server, table)
                envoy.inject(**faults)
                controller.wait_for(lambda: controller.is_in_state("stale"), "stale input")
                controller.wait_for(lambda: _is_full(table), "full quality")
                history = controller.get("/history.json").json()["points"]
                assert any(problem in (point["error"] or "") for point in history)
                envoy.inject()
            controller.wait_for(lambda: controller.is_in_state("valid"), "valid input again")
