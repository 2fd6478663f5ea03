"""Real controller processes against a stand-in that serves recorded SGLang metrics.

The stand-in is there because the faults - a hang, garbage, a 500, a restart of the engine - cannot
be had from the real server on demand. Tests with the real server are in tests/integration.
"""

import json
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from ahead import write_cost_model
from busy_ranks import loads_page, metrics_page
from controller_process import ControllerProcess, call, running, write_config
from stand_in_server import StandInServer, free_port, serving
from virtual_loop import publish_table

from sglang_alloc.shared_table import SharedTable

FULL = (48, 48)


def _is_beating(table: SharedTable) -> bool:
    age_ns = time.monotonic_ns() - table.heartbeat_ns()
    return age_ns < 2_000_000_000


def test_a_running_controller_is_small(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    with running(write_config(tmp_path, server.url)) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        _assert_small(controller)
    assert _is_beating(table)


def test_a_controller_that_looks_ahead_is_as_small(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    """Eight ranks, which tell their step times; after 3 s comes a rush, and nothing is late."""

    def gives_up_quality(began: float) -> bool:
        seconds = time.monotonic() - began
        requests = round(seconds + 100.0 * max(0.0, seconds - 3.0))
        server.loads, server.page = loads_page(requests), metrics_page(requests)
        return max(table.selector()[1:]) < 48

    server.loads, server.page = loads_page(0), metrics_page(0)
    quality = {"cost_model": write_cost_model(tmp_path / "cost.csv")}
    with running(write_config(tmp_path, server.url, quality=quality)) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        began = time.monotonic()
        controller.wait_for(lambda: gives_up_quality(began), "a lower budget")
        controller.wait_for(lambda: "predicted_overload" in controller.log(), "the reason")
        _assert_small(controller)


def _assert_small(controller: ControllerProcess) -> None:
    maps = Path(f"/proc/{controller.process.pid}/maps").read_text()
    status = Path(f"/proc/{controller.process.pid}/status").read_text()
    assert "libtorch" not in maps
    (resident_kib,) = re.findall(r"VmRSS:\s+(\d+) kB", status)
    assert int(resident_kib) < 80 * 1024


def test_a_recorded_burst_lowers_the_budgets_and_sigterm_gives_them_back(
    tmp_path: Path, table: SharedTable, server: StandInServer, recorded: Path
) -> None:
    with running(write_config(tmp_path, server.url)) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        server.page = (recorded / "burst.txt").read_text()
        controller.wait_for(lambda: max(table.selector()[1:]) < 48, "a lower budget")
        controller.wait_for(lambda: "queue_slo" in controller.log(), "the reason")
        assert controller.stop() == 0
    assert table.selector()[1:] == FULL
    assert json.loads(controller.log().splitlines()[-1])["event"] == "stopped"


def test_after_sigkill_the_next_controller_goes_on_without_a_jump(
    tmp_path: Path, table: SharedTable, server: StandInServer, recorded: Path
) -> None:
    config = write_config(tmp_path, server.url)
    with running(config) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        server.page = (recorded / "burst.txt").read_text()
        controller.wait_for(lambda: max(table.selector()[1:]) < 48, "a lower budget")
        assert controller.stop(signal.SIGKILL) == -signal.SIGKILL
    left = table.selector()
    server.page = (recorded / "first.txt").read_text()
    with running(config) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        assert table.selector() == left
        assert table.writer_epoch() == 2
        assert _is_beating(table)


def test_a_hanging_endpoint_becomes_stale_while_the_heart_beats(
    tmp_path: Path, table: SharedTable, server: StandInServer, recorded: Path
) -> None:
    with running(write_config(tmp_path, server.url)) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        server.page = (recorded / "burst.txt").read_text()
        controller.wait_for(lambda: max(table.selector()[1:]) < 48, "a lower budget")
        server.fault = "hang"
        controller.wait_for(lambda: controller.is_in_state("stale"), "stale input")
        controller.wait_for(lambda: table.selector()[1:] == FULL, "full quality")
        assert _is_beating(table)
        assert controller.get("/livez").status_code == 200
        assert controller.get("/readyz").text == "The input is stale.\n"
        server.fault = "none"
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input again")


@pytest.mark.parametrize("fault", ["garbage", "error", "cut", "drip"])
def test_a_source_that_answers_nonsense_becomes_stale(
    tmp_path: Path, table: SharedTable, server: StandInServer, fault: str
) -> None:
    with running(write_config(tmp_path, server.url)) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        server.fault = fault
        controller.wait_for(lambda: controller.is_in_state("stale"), "stale input")
        assert _is_beating(table)
        controller.wait_for(lambda: "source_failed" in controller.log(), "the problem")


def test_a_restarted_engine_is_seen(
    tmp_path: Path, table: SharedTable, server: StandInServer, recorded: Path
) -> None:
    with running(write_config(tmp_path, server.url)) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        server.page = (recorded / "start.txt").read_text()
        controller.wait_for(
            lambda: controller.has("sglang_alloc_controller_engine_restarts_total 1.0"),
            "the restart",
        )
        assert table.selector()[1:] == FULL


def test_a_controller_waits_for_a_server_that_is_not_there_yet(
    tmp_path: Path, table: SharedTable, recorded: Path
) -> None:
    port = free_port()
    with running(write_config(tmp_path, f"http://127.0.0.1:{port}")) as controller:
        controller.wait_for(lambda: controller.is_in_state("stale"), "stale input")
        assert "source_not_there_yet" in controller.log()
        with serving((recorded / "first.txt").read_text(), port):
            controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        assert _is_beating(table)


def test_a_password_in_the_sources_address_is_shown_nowhere(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    url, log = server.url.replace("//", "//ana:s3cr3t%2F@"), tmp_path / "d.jsonl"
    section = {"path": str(log), "every_tick": True}
    config = write_config(tmp_path, url, decision_log=section)
    with running(config) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        for fault in ("error", "cut"):
            server.fault = fault
            before = controller.value("source_failures_total")
            controller.wait_for(
                lambda before=before: controller.value("source_failures_total") > before, fault
            )
        told = [controller.get(path).text for path in ("/history.json", "/metrics")]
        told += [log.read_text(), controller.log(), call("check", "-c", str(config)).stdout]
        assert controller.stop() == 0
    assert f"http://***@127.0.0.1:{server.port}" in told[0]
    assert not [text for text in told if "s3cr3t" in text or "ana:" in text]


def test_a_prometheus_that_is_down_is_waited_for(tmp_path: Path, table: SharedTable) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    config = write_config(
        tmp_path, url, source={"kind": "prometheus", "url": url, "poll_seconds": 0.1}
    )
    with running(config) as controller:
        controller.wait_for(lambda: controller.is_in_state("stale"), "stale input")
        controller.wait_for(lambda: _is_beating(table), "a heartbeat")
        assert controller.stop() == 0


def test_a_second_controller_is_refused(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    config = write_config(tmp_path, server.url)
    with running(config) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        second = call("run", "--config", str(config))
        assert second.returncode == 2
        assert f"but pid {controller.process.pid} already does" in second.stderr
        assert "Traceback" not in second.stderr
        assert _is_beating(table)


def test_a_missing_table_is_refused(tmp_path: Path, server: StandInServer) -> None:
    refused = call("run", "--config", str(write_config(tmp_path, server.url)))
    assert refused.returncode == 2
    assert "There is no shared table at" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.usefixtures("table")
def test_an_slo_that_is_no_bucket_edge_is_refused_at_the_start(
    tmp_path: Path, server: StandInServer
) -> None:
    slo = {"ttft_seconds": 0.7, "itl_seconds": 0.05}
    refused = call("run", "--config", str(write_config(tmp_path, server.url, slo=slo)))
    assert refused.returncode == 2
    assert "--bucket-time-to-first-token" in refused.stderr


@pytest.mark.usefixtures("table")
def test_a_metrics_port_in_use_is_refused_and_the_table_left_alone(
    tmp_path: Path, server: StandInServer
) -> None:
    config = write_config(tmp_path, server.url, http={"port": server.port})
    refused = call("run", "--config", str(config))
    assert refused.returncode == 2
    assert f"http.port {server.port}: Address already in use" in refused.stderr


def test_with_retries_a_refused_controller_waits_and_works_once_it_can(
    tmp_path: Path, server: StandInServer
) -> None:
    publish_table(tmp_path / "t.tbl")
    port = free_port()
    impossible = {"decode_floor_budget": 1_000_000}
    config = write_config(tmp_path, server.url, http={"port": port}, quality=impossible)
    with running(config, "--retry-seconds", "0.1") as controller:
        controller.wait_for(lambda: controller.log().count('"refused"') > 2, "more tries")
        assert "decode_floor_budget is 1000000" in controller.log()
        controller.process.send_signal(signal.SIGHUP)
        write_config(tmp_path, server.url, http={"port": port})
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        assert controller.stop() == 0


def test_with_retries_a_refused_controller_ends_when_it_is_told_to(tmp_path: Path) -> None:
    config = write_config(tmp_path, "http://127.0.0.1:9")
    with running(config, "--retry-seconds", "600") as controller:
        controller.wait_for(lambda: "no shared table" in controller.log(), "the refusal")
        assert controller.stop() == 0


def test_a_replaced_table_is_followed(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    with running(write_config(tmp_path, server.url)) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        publish_table(tmp_path / "t.tbl", top_k=4)
        replaced = SharedTable.open(tmp_path / "t.tbl")
        controller.wait_for(lambda: replaced.heartbeat_ns() > 0, "a beat in the new table")
        assert "table_replaced" in controller.log()
        assert not table.is_current()


@pytest.mark.usefixtures("table")
def test_check_passes_where_run_would_work(tmp_path: Path, server: StandInServer) -> None:
    checked = call("check", "--config", str(write_config(tmp_path, server.url)))
    assert checked.returncode == 0, checked.stdout
    assert "slo.itl_seconds 0.05 is a bucket edge" in checked.stdout
    assert "failed" not in checked.stdout


def test_check_tells_every_problem_at_once(tmp_path: Path, server: StandInServer) -> None:
    slo = {"ttft_seconds": 0.7, "itl_seconds": 0.05}
    checked = call("check", "--config", str(write_config(tmp_path, server.url, slo=slo)))
    assert checked.returncode == 1
    failed = [line for line in checked.stdout.splitlines() if line.startswith("failed")]
    assert len(failed) == 2
    assert "There is no shared table" in failed[0]
    assert "slo.ttft_seconds is 0.7" in failed[1]


def test_check_tells_what_run_would_refuse_beside_table_and_source(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    log = tmp_path / "none" / "d.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = write_config(
            tmp_path,
            server.url,
            http={"port": taken.getsockname()[1]},
            control={"token_file": str(tmp_path / "token")},
            decision_log={"path": str(log)},
        )
        checked, ran = call("check", "--config", str(config)), call("run", "--config", str(config))
    assert (checked.returncode, ran.returncode) == (1, 2)
    failed = [line for line in checked.stdout.splitlines() if line.startswith("failed")]
    assert len(failed) == 3
    assert "control.token_file" in failed[0]
    assert "Address already in use" in failed[1]
    assert f"decision_log.path is {log}" in failed[2]
    assert not log.parent.exists()


def test_check_beside_the_running_controller_does_not_blame_its_port(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    config = write_config(tmp_path, server.url)
    with running(config) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        checked = call("check", "--config", str(config))
        assert "no_cost_model" in controller.log()
    assert checked.returncode == 0, checked.stdout
    assert f"A controller of this table runs (pid {controller.process.pid})" in checked.stdout


def test_check_tells_what_the_bounds_cost_and_what_is_not_bounded(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    checked = call("check", "--config", str(write_config(tmp_path, server.url)))
    assert "between 6 and 48, predicted loss up to 0.2 nats per token" in checked.stdout
    assert "quality.max_predicted_loss is not set" in checked.stdout
    assert "quality.cost_model is not set, so the law does not look ahead" in checked.stdout
    quality = {"max_predicted_loss": 0.1}
    checked = call("check", "--config", str(write_config(tmp_path, server.url, quality=quality)))
    assert "between 27 and 48, predicted loss up to 0.1 nats per token" in checked.stdout
    assert "both at their floors 0.2 nats per token may be lost together" in checked.stdout
    assert "max_predicted_loss is not set" not in checked.stdout


def test_check_tells_that_a_server_offers_no_loads(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    sentence = "does not offer /v1/loads, or not to us"
    checked = call("check", "--config", str(write_config(tmp_path, server.url)))
    assert (checked.returncode, sentence in checked.stdout) == (0, True)
    server.loads = loads_page(100)
    checked = call("check", "--config", str(write_config(tmp_path, server.url)))
    assert sentence not in checked.stdout


def test_check_tells_of_ranks_whose_prompt_tokens_the_server_does_not_show(
    tmp_path: Path, table: SharedTable, server: StandInServer
) -> None:
    """Eight data-parallel ranks on two nodes, of which the first answers."""
    lines = metrics_page(100).splitlines(keepends=True)
    server.page = "".join(line for line in lines if re.search(r'dp_rank="[0-3]"', line))
    server.loads = loads_page(100)
    checked = call("check", "--config", str(write_config(tmp_path, server.url)))
    assert "names 8 data-parallel ranks, and /metrics counts the prompt tokens of 4" in (
        checked.stdout
    )
    server.page = metrics_page(100)
    checked = call("check", "--config", str(write_config(tmp_path, server.url)))
    assert "data-parallel ranks" not in checked.stdout


def test_check_names_a_priority_that_the_server_does_not_show(
    tmp_path: Path, table: SharedTable, recorded: Path
) -> None:
    with serving((recorded / "tp2_priority_burst.txt").read_text()) as server:
        source = {"url": server.url, "priorities": ["7"], "streaming_only": False}
        checked = call("check", "--config", str(write_config(tmp_path, server.url, source=source)))
    assert "chooses 7, which the server has not shown yet" in checked.stdout


def test_check_refuses_a_bad_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("tabel: x\n")
    checked = call("check", "--config", str(path))
    assert checked.returncode == 2
    assert "tabel is not a setting" in checked.stderr


def test_schema_prints_the_schema() -> None:
    printed = call("schema")
    assert printed.returncode == 0
    assert json.loads(printed.stdout)["title"] == "Settings"
