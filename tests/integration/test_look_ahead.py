"""The law that looks ahead, on a real server: what the load needs, before anything is late."""

from __future__ import annotations

import csv
import json
import re
import signal
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from live_parts import live_controller, live_load, live_server
from waiting import PATIENCE_SECONDS, wait_until

from sglang_alloc.demo.load import RequestRecord
from sglang_alloc.demo.trace import LoadPhase
from sglang_alloc.server_runs.server_process import free_port
from sglang_alloc.shared_table import Selector, SharedTable
from sglang_alloc_controller.bench_csv import DEFAULT_BENCH
from sglang_alloc_controller.decision_record import TICK

pytestmark = pytest.mark.server

# What the cost model says of this server is this many times too slow: two requests a second then
# look like far more than it carries, while it has answered them before the next ones come. Its own
# step times show that, but no server is believed to be more than four times as fast as its bench.
SLOWER = 40.0
TTFT_SECONDS, ITL_SECONDS = 10.0, 1.0
LOAD = LoadPhase("load", seconds=60.0, requests_per_second=2.0)


@dataclass
class Seen:
    """What was seen while the load lasted, and after it."""

    lowered: Selector
    after_load: Selector
    records: list[RequestRecord]
    reasons: set[str]
    step_time_ratios: dict[str, float]
    """By phase, at the end of the load."""
    full: int


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder, port = tmp_path_factory.mktemp("ahead"), free_port()
    with live_server(folder) as server, SharedTable.open(folder / "live.tbl") as table:
        full = table.shape.budget_max
        config = _config(folder, server.url, port)
        with (
            live_controller(folder, config, port) as process,
            live_load(server.url, LOAD) as load,
        ):
            wait_until(lambda: table.selector().decode_budget < full, "quality was given up")
            lowered = table.selector()
            records = load.result(timeout=LOAD.seconds + PATIENCE_SECONDS)
            ratios = _step_time_ratios(port)
            wait_until(
                lambda: table.selector()[1:] == (full, full), "quality came back after the load"
            )
            after_load = table.selector()
            process.popen.send_signal(signal.SIGTERM)
            process.popen.wait(timeout=20)
        log = (folder / "decisions.jsonl").read_text().splitlines()
    ticks = [line for line in map(json.loads, log) if line["kind"] == TICK]
    reasons = {reason for tick in ticks for reason in tick["reasons"].values()}
    return Seen(lowered, after_load, records, reasons, ratios, full)


def _step_time_ratios(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = re.findall(r'_step_time_ratio\{phase="(\w+)"\} (\S+)', answer.read().decode())
    return {phase: float(ratio) for phase, ratio in found}


def _config(folder: Path, server: str, port: int) -> Path:
    settings = {
        "table": str(folder / "live.tbl"),
        "source": {"url": server, "poll_seconds": 0.5},
        # Two cores that do other work, too, may let a queue grow for a moment: not what is tested.
        "slo": {
            "ttft_seconds": TTFT_SECONDS,
            "itl_seconds": ITL_SECONDS,
            "queue_requests": 50.0,
        },
        "quality": {"cost_model": str(_slow_cost_model(folder))},
        "freshness": {"warmup_seconds": 0.0},
        "http": {"port": port},
        "decision_log": {"path": str(folder / "decisions.jsonl")},
    }
    path = folder / "controller.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _slow_cost_model(folder: Path) -> Path:
    with DEFAULT_BENCH.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("median_ms", "stock_median_ms"):
            if row.get(name):
                row[name] = str(SLOWER * float(row[name]))
    path = folder / "cost_model.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_budgets_fall_by_the_measured_load_while_no_answer_is_late(seen: Seen) -> None:
    assert seen.lowered.decode_budget < seen.full
    assert "predicted_overload" in seen.reasons
    assert seen.reasons.isdisjoint({"ttft_slo", "itl_slo", "queue_slo"})
    assert all(record.ttft_seconds < TTFT_SECONDS for record in seen.records if record.ttft_seconds)


def test_the_servers_own_step_times_show_that_the_cost_model_is_of_another_machine(
    seen: Seen,
) -> None:
    assert seen.step_time_ratios.keys() == {"prefill", "decode"}
    assert all(0.0 < ratio < 0.5 for ratio in seen.step_time_ratios.values())


def test_every_request_of_it_is_answered_in_full(seen: Seen) -> None:
    assert len(seen.records) > 60
    assert [record.error for record in seen.records if record.error] == []


def test_after_the_load_the_server_has_full_quality(seen: Seen) -> None:
    assert seen.after_load[1:] == (seen.full, seen.full)
    assert "idle" in seen.reasons
