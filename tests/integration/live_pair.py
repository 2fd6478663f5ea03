"""A real server, a real controller and a real Prometheus, and the story they are put through.

The latency promise is one that no machine keeps, so that the controller has to act; killing it in
mid-load and starting it again are part of the story.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import yaml
from live_ordeals import LOST_SECONDS, Ordeals, Pair, go_through
from panel_queries import PanelQuery, panel_queries
from prometheus_files import DASHBOARD, RULE_FILES
from prometheus_server import Prometheus, running_prometheus
from waiting import PATIENCE_SECONDS, wait_until

from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.demo.load import RequestRecord, offer_load
from sglang_alloc.demo.trace import LoadPhase, make_trace
from sglang_alloc.server_runs.owned_process import OwnedProcess, owned_process
from sglang_alloc.server_runs.reference_files import MODEL, REFERENCE
from sglang_alloc.server_runs.server_process import (
    Server,
    console_script,
    free_port,
    serve,
    wait_until_ready,
)
from sglang_alloc.shared_table import Selector, SharedTable, publish_shared_table
from sglang_alloc_controller.sglang_loads import LOADS_PATH

# 1 ms per token and 2 ms to the first one: broken by every request on every machine.
IMPOSSIBLE_ITL_SECONDS, IMPOSSIBLE_TTFT_SECONDS = 0.001, 0.002
STALE_AFTER_SECONDS = 3.0
LOAD = LoadPhase("load", seconds=70.0, requests_per_second=2.0)


@dataclass
class Evidence:
    """What was seen while the story ran."""

    before: Selector | None = None
    lowered: Selector | None = None
    fallback_sources: set[int] = field(default_factory=set)
    resumed: Selector | None = None
    released: Selector | None = None
    records: list[RequestRecord] = field(default_factory=list)
    server_metrics: str = ""
    server_loads: str = ""
    ordeals: Ordeals | None = None
    empty_queries: list[PanelQuery] = field(default_factory=list)


def run_story(folder: Path, prometheus_binary: str) -> Evidence:
    """Run it all once; the tests look at the evidence."""
    evidence, controller_port = Evidence(), free_port()
    with ExitStack() as stack:
        server = stack.enter_context(live_server(folder))
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
            process.popen.send_signal(signal.SIGTERM)
            process.popen.wait(timeout=20)
        evidence.released = table.selector()
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
    evidence.server_metrics = _get(f"{server}/metrics")
    evidence.server_loads = _get(f"{server}{LOADS_PATH}")


@contextmanager
def live_server(folder: Path) -> Iterator[Server]:
    """Run SGLang with the reference model and the shared table `folder`/live.tbl."""
    edges = ("0.001", "0.01", "0.05", "0.1", "1", "10")
    arguments = (
        *("--dtype", "float32", "--skip-server-warmup", "--decode-log-interval", "5"),
        *("--bucket-inter-token-latency", *edges),
        *("--bucket-time-to-first-token", "0.002", *edges[1:]),
    )
    environment = {"SGLANG_ALLOC_STALE_AFTER_SECONDS": str(STALE_AFTER_SECONDS)}
    publish_shared_table(folder / "live.tbl", load_budget_tables(MODEL / "budget_tables.npz"))
    with serve(
        MODEL,
        table=folder / "live.tbl",
        log_path=folder / "server.log",
        extra_args=arguments,
        env=environment,
    ) as server:
        yield server


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


@contextmanager
def live_controller(folder: Path, config: Path, port: int) -> Iterator[OwnedProcess]:
    """Run the controller with this configuration until the block ends."""
    command = [console_script("sglang-alloc-controller"), "run", "--config", str(config)]
    log = folder / f"controller-{time.monotonic_ns()}.log"
    with owned_process("the controller", command, log_path=log) as process:
        wait_until_ready(process, f"http://127.0.0.1:{port}/livez", PATIENCE_SECONDS)
        yield process


@contextmanager
def live_load(server: str, load: LoadPhase) -> Iterator[Future[list[RequestRecord]]]:
    """Offer this load while the block runs, of short prompts and answers of 24 tokens."""
    texts = [path.read_text() for path in sorted((REFERENCE / "samples").glob("heldout_*.txt"))]
    trace = make_trace(texts, [load], prompt_bytes=200, output_tokens=24, seed=3)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(
            lambda: asyncio.run(offer_load(server, trace, timeout_seconds=LOST_SECONDS))
        )


def _acknowledged(table: SharedTable) -> tuple[int, int]:
    counters = table.worker_counters()[0]
    return counters.prefill_budget, counters.decode_budget


def _get(url: str) -> str:
    response = httpx2.get(url, timeout=10.0, trust_env=False)
    response.raise_for_status()
    return response.text
