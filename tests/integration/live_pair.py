"""A real server, a real controller and a real Prometheus, and the story they are put through.

The latency promise is one that no machine keeps, so that the controller has to act; killing it in
mid-load and starting it again are part of the story.
"""

from __future__ import annotations

import json
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import yaml
from live_ordeals import Ordeals, Pair, go_through
from live_parts import live_controller, live_load, live_server
from live_restart import Restart, restart
from panel_queries import PanelQuery, panel_queries
from prometheus_files import DASHBOARD, RULE_FILES
from prometheus_server import Prometheus, running_prometheus
from waiting import PATIENCE_SECONDS, wait_until

from sglang_alloc.demo.load import RequestRecord
from sglang_alloc.demo.trace import LoadPhase
from sglang_alloc.server_runs.server_process import free_port
from sglang_alloc.shared_table import Selector, SharedTable
from sglang_alloc_controller.decision_record import TICK
from sglang_alloc_controller.samples import Reading
from sglang_alloc_controller.settings import SourceSettings
from sglang_alloc_controller.sglang_loads import LOADS_PATH
from sglang_alloc_controller.source import open_source

# 1 ms per token and 2 ms to the first one: broken by every request on every machine.
IMPOSSIBLE_ITL_SECONDS, IMPOSSIBLE_TTFT_SECONDS = 0.001, 0.002
LOAD = LoadPhase("load", seconds=70.0, requests_per_second=2.0)


@dataclass
class Evidence:
    """What was seen while the story ran."""

    table: Path
    before: Selector | None = None
    lowered: Selector | None = None
    fallback_sources: set[int] = field(default_factory=set)
    resumed: Selector | None = None
    released: Selector | None = None
    records: list[RequestRecord] = field(default_factory=list)
    server_metrics: str = ""
    server_loads: str = ""
    by_prometheus: Reading | None = None
    direct: Reading | None = None
    """Of the same server's /metrics, a moment later."""
    ordeals: Ordeals | None = None
    restart: Restart | None = None
    logged_budgets: set[int] = field(default_factory=set)
    """Of both phases, from the decision log."""
    empty_queries: list[PanelQuery] = field(default_factory=list)


def run_story(folder: Path, prometheus_binary: str) -> Evidence:
    """Run it all once; the tests look at the evidence."""
    evidence, controller_port = Evidence(folder / "live.tbl"), free_port()
    with ExitStack() as stack:
        serving = stack.enter_context(ExitStack())
        server = serving.enter_context(live_server(folder))
        table = stack.enter_context(SharedTable.open(folder / "live.tbl"))
        config = _write_config(folder, server.url, controller_port)
        prometheus = stack.enter_context(
            running_prometheus(
                prometheus_binary,
                folder,
                _targets(server.url, controller_port),
                RULE_FILES,
            )
        )
        load = stack.enter_context(live_load(server.url, LOAD))
        _control_kill_resume(folder, config, controller_port, table, evidence)
        with live_controller(folder, config, controller_port) as process:
            _look(evidence, server.url, prometheus)
            pair = Pair(
                server.url, server.process.pid, f"http://127.0.0.1:{controller_port}", config, table
            )
            evidence.ordeals = go_through(pair)
            evidence.records = load.result(timeout=LOAD.seconds + PATIENCE_SECONDS)
            evidence.restart = restart(pair, folder, serving)
            process.popen.send_signal(signal.SIGTERM)
            process.popen.wait(timeout=20)
        evidence.released = table.selector()
    evidence.logged_budgets = _logged_budgets(folder)
    return evidence


def _targets(server: str, controller_port: int) -> dict[str, list[str]]:
    return {
        "serving": [server.removeprefix("http://")],
        "controller": [f"127.0.0.1:{controller_port}"],
    }


def _control_kill_resume(
    folder: Path, config: Path, port: int, table: SharedTable, evidence: Evidence
) -> None:
    evidence.before = table.selector()
    full = table.shape.budget_max
    with live_controller(folder, config, port) as process:
        wait_until(lambda: table.selector().decode_budget < full, "the decode budget was lowered")
        # Else the full budgets from before would pass for those of the fallback.
        wait_until(lambda: _acknowledged(table)[1] < full, "the worker took the lower budget over")
        process.popen.send_signal(signal.SIGKILL)
        process.popen.wait()
    evidence.lowered = table.selector()
    wait_until(lambda: _acknowledged(table) == (full, full), "the worker fell back to full quality")
    evidence.fallback_sources = {c.acknowledged_source for c in table.worker_counters()}
    with live_controller(folder, config, port):
        wait_until(lambda: _acknowledged(table) != (full, full), "the restarted controller resumed")
        evidence.resumed = Selector(0, *_acknowledged(table))


def _look(evidence: Evidence, server: str, prometheus: Prometheus) -> None:
    queries = panel_queries(DASHBOARD)
    evidence.empty_queries = prometheus.wait_until_none_is_empty(queries, PATIENCE_SECONDS)
    evidence.by_prometheus = _read(
        SourceSettings(kind="prometheus", url=prometheus.url, selector='job="serving"')
    )
    evidence.direct = _read(SourceSettings(url=server, loads=False))
    evidence.server_metrics = _get(f"{server}/metrics")
    evidence.server_loads = _get(f"{server}{LOADS_PATH}")


def _write_config(folder: Path, server: str, port: int) -> Path:
    settings: dict[str, Any] = {
        "table": str(folder / "live.tbl"),
        "source": {"url": server, "poll_seconds": 0.5},
        "slo": {"ttft_seconds": IMPOSSIBLE_TTFT_SECONDS, "itl_seconds": IMPOSSIBLE_ITL_SECONDS},
        "freshness": {"warmup_seconds": 0.0},
        "http": {"port": port},
        "decision_log": {"path": str(folder / "decisions.jsonl")},
    }
    path = folder / "controller.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _read(settings: SourceSettings) -> Reading:
    source = open_source(settings, time.monotonic)
    try:
        return source.read()
    finally:
        source.close()


def _logged_budgets(folder: Path) -> set[int]:
    log = map(json.loads, (folder / "decisions.jsonl").read_text().splitlines())
    return {budget for line in log if line["kind"] == TICK for budget in line["to"].values()}


def _acknowledged(table: SharedTable) -> tuple[int, int]:
    counters = table.worker_counters()[0]
    return counters.prefill_budget, counters.decode_budget


def _get(url: str) -> str:
    response = httpx2.get(url, timeout=10.0, trust_env=False)
    response.raise_for_status()
    return response.text
