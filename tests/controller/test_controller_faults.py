"""Faults on real processes: no budget outside its bounds, and a state that an operator can read."""

import fcntl
import json
import os
import random
import resource
import signal
import time
from pathlib import Path

from controller_process import ControllerProcess, running, write_config
from envoy_proxy import proxying
from loads_answers import answer, rank
from stand_in_server import StandInServer, free_port, serving
from virtual_loop import publish_table

from sglang_alloc.shared_table import Fallback, Selection, SharedTable

FULL = (48, 48)
FLOOR = 24
QUALITY = {"prefill_floor_budget": FLOOR, "decode_floor_budget": FLOOR}


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


def test_a_server_that_goes_away_and_comes_back_with_another_model_is_a_start_and_is_told(
    tmp_path: Path, table: SharedTable, recorded: Path
) -> None:
    page, port = (recorded / "first.txt").read_text(), free_port()
    with running(write_config(tmp_path, f"http://127.0.0.1:{port}", quality=QUALITY)) as controller:
        with serving(page, port) as server:
            _lower(controller, server, table)
        controller.wait_for(lambda: controller.is_in_state("stale"), "stale input")
        controller.wait_for(lambda: _is_full(table), "full quality")
        before = controller.value("engine_restarts_total")
        with serving(page.replace('model_name="tiny-moe"', 'model_name="other"'), port):
            controller.wait_for(lambda: controller.is_in_state("valid"), "valid input again")
            assert "model_changed" in controller.log()
            assert controller.value("engine_restarts_total") == before + 1
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


def test_a_full_disk_costs_both_logs_their_lines_and_nothing_else(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    log = tmp_path / "d.jsonl"
    section = {"path": str(log), "every_tick": True}
    with running(write_config(tmp_path, server.url, decision_log=section)) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        _limit_file_size(controller, 1)
        _lower(controller, server, table)
        controller.wait_for(lambda: controller.value("decision_log_errors_total") > 3, "lost lines")
        assert controller.value("tick_errors_total") == 0
        _limit_file_size(controller, resource.RLIM_INFINITY)
        held = len(log.read_bytes())
        controller.wait_for(lambda: log.stat().st_size > held, "lines again")
        assert controller.stop() == 0
    assert _is_full(table)
    assert {json.loads(line)["kind"] for line in log.read_text().splitlines()} <= {
        "beginning", "tick"
    }  # fmt: skip


def _limit_file_size(controller: ControllerProcess, size: int) -> None:
    """Let no file of the controller grow beyond this many bytes, as a full disk would."""
    hard = resource.prlimit(controller.process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(controller.process.pid, resource.RLIMIT_FSIZE, (size, hard))


def test_a_table_cut_short_by_a_person_ends_no_process(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    with running(write_config(tmp_path, server.url)) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        os.truncate(tmp_path / "t.tbl", 0)
        controller.wait_for(lambda: controller.value("tick_errors_total") > 0, "failing ticks")
        assert "cut" in controller.log() or "lost" in controller.log()
        publish_table(tmp_path / "t.tbl")
        fresh = SharedTable.open(tmp_path / "t.tbl")
        controller.wait_for(lambda: fresh.heartbeat_ns() > 0, "a beat in the new table")
        assert controller.stop() == 0


def test_a_paused_controller_is_replaced_by_the_workers_fallback_and_goes_on(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    with running(write_config(tmp_path, server.url, quality=QUALITY)) as controller:
        _lower(controller, server, table)
        controller.process.send_signal(signal.SIGSTOP)
        held = table.selector()
        controller.wait_for(lambda: _in_force(table).source == "fallback", "the fallback")
        assert _in_force(table)[2:] == (*FULL, None)
        assert table.selector() == held
        controller.process.send_signal(signal.SIGCONT)
        controller.wait_for(lambda: _in_force(table).source == "controller", "control again")
        assert min(table.selector()[1:]) >= FLOOR
        assert controller.value("tick_errors_total") == 0


def _in_force(table: SharedTable, later_seconds: float = 0.0) -> Selection:
    """Return what a worker whose limit is a second makes of the table."""
    now_ns = time.monotonic_ns() + int(later_seconds * 1e9)
    return table.selection(now_ns, 1_000_000_000, Fallback("full"))


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
    for _ in range(4):
        left = table.selector()
        with running(config) as controller:
            time.sleep(moments.uniform(0.2, 1.5))  # some die while they start, some at work
            controller.stop(signal.SIGKILL)
        assert all(FLOOR <= budget <= 48 for budget in table.selector()[1:])
        assert table.selector().generation >= left.generation
        assert table.is_intact()
        fallen_back = _in_force(table, later_seconds=2.0)
        assert (fallen_back.source, *fallen_back[2:]) == ("fallback", *FULL, None)
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


def test_a_stalled_reader_of_its_log_costs_lines_and_not_the_control_loop(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    config = write_config(tmp_path, server.url)
    with running(config, log=writer) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        for number in range(60):
            # Each order is two lines of the log.
            assert controller.order("/reload", actor=f"{number:060}").status_code == 200
        controller.wait_for(lambda: controller.value("log_lines_lost_total") > 0, "lost lines")
        _lower(controller, server, table)
        assert controller.stop() == 0
    assert _is_full(table)
    os.close(reader)
    os.close(writer)
