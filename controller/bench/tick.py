"""What the controller costs: CPU time of a tick and of a reading, and resident memory.

    python controller/bench/tick.py [--ranks 8] [--ticks 400]

A server process of its own shows /metrics and /v1/loads of an engine with `--ranks` ranks: 0.7 MB
at 8, as SGLang 0.5.23 writes it with about 90 kB of other metrics per rank. Readings
come over HTTP.
The budget tables have 1,411 budgets of 94 layers. Each tick gets a new reading, twice what happens
in service, keeps a point for the live page and writes a line of the decision log. Prints one JSON
line.
"""

import argparse
import itertools
import json
import logging
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import numpy as np
import structlog

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.shared_table import publish_shared_table
from sglang_alloc_controller.decision_log import DecisionLog
from sglang_alloc_controller.loop import ControlLoop, Surroundings
from sglang_alloc_controller.own_metrics import OwnMetrics
from sglang_alloc_controller.page_history import PageHistory
from sglang_alloc_controller.settings import Settings, parse_settings
from sglang_alloc_controller.sglang_metrics import SGLangMetrics
from sglang_alloc_controller.source_poller import Observation
from sglang_alloc_controller.table_link import TableLink

_LAYERS, _TOP_K, _EXPERTS = 94, 16, 128
_EDGES = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, float("inf"))
_OTHER_BYTES_PER_RANK = 90_000
_NANOSECONDS = 1_000_000_000
_Result = TypeVar("_Result")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--ticks", type=int, default=400)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, arguments.ranks), daemon=True
    )
    server.start()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(Path(folder), ours.recv(), arguments.ranks, arguments.ticks)))
    server.kill()


def _measure(folder: Path, port: int, ranks: int, ticks: int) -> dict[str, float]:
    settings = _settings(folder, port)
    _publish(Path(settings.table))
    metrics = OwnMetrics(settings.mode, settings.slo)
    history = PageHistory(lambda: settings)
    source = SGLangMetrics(settings.source, time.monotonic)
    now_ns = itertools.count(1000 * _NANOSECONDS, _NANOSECONDS // 2)
    observation = Observation(None, 0, None)
    around = Surroundings(
        lambda: observation, lambda: next(now_ns), lambda seconds: False, show=history.add
    )
    loop = ControlLoop(
        settings,
        TableLink(Path(settings.table), lambda table: None),
        metrics,
        DecisionLog(settings.decision_log, metrics.count_log_error),
        around,
    )
    reading_seconds, tick_seconds, scrape_seconds = [], [], []
    for tick in range(ticks):
        reading, seconds = _timed(source.read)
        reading_seconds.append(seconds)
        observation = Observation(replace(reading, taken_at_seconds=1000 + tick / 2), 0, None)
        tick_seconds.append(_timed(loop.tick)[1])
        scrape_seconds.append(_timed(metrics.text)[1])
    per_poll = settings.tick_seconds / settings.source.poll_seconds
    reading_ms, tick_ms = (1e3 * statistics.median(s) for s in (reading_seconds, tick_seconds))
    return {
        "ranks": ranks,
        "page_bytes": len(_page(ranks, ticks)),
        "tick_ms_median": tick_ms,
        "tick_ms_p99": 1e3 * statistics.quantiles(tick_seconds, n=100)[98],
        "reading_ms_median": reading_ms,
        "tick_with_its_readings_ms": tick_ms + per_poll * reading_ms,
        "scrape_ms_median": 1e3 * statistics.median(scrape_seconds),
        "live_page_ms": 1e3 * _timed(lambda: history.answer("minutes"))[1],
        "resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _serve(told: Connection, ranks: int) -> None:
    """Show metrics that move with each scrape, and loads; tell the port."""
    scrapes = itertools.count()

    class Request(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            is_loads = self.path.startswith("/v1/loads")
            body = _loads(ranks) if is_loads else _page(ranks, next(scrapes))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Request)
    told.send(server.server_address[1])
    server.serve_forever()


def _loads(ranks: int) -> str:
    now = datetime.now(timezone.utc)
    load = {
        "timestamp": now.timestamp(),
        "num_running_reqs": 32,
        "num_waiting_reqs": 3,
        "num_waiting_uncached_tokens": 2048,
        "num_used_tokens": 120_000,
        "num_total_tokens": 120_000,
        "max_total_num_tokens": 400_000,
        "max_running_requests": 64,
        "token_usage": 0.3,
        "gen_throughput": 1200.5,
        "cache_hit_rate": 0.1,
        "utilization": 0.5,
        "decode_moments": [1000.0, 32_000.0, 3e7, 1e6, 1e9, 32_000.0],
    }
    loads = [{**load, "dp_rank": rank} for rank in range(ranks)]
    return json.dumps({"timestamp": now.isoformat(), "version": "0.5.23", "loads": loads})


def _timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    started = time.thread_time()
    result = call()
    return result, time.thread_time() - started


def _settings(folder: Path, port: int) -> Settings:
    return parse_settings(
        {
            "table": str(folder / "bench.tbl"),
            "source": {"url": f"http://127.0.0.1:{port}"},
            "slo": {"ttft_seconds": 1.0, "itl_seconds": 0.05},
            "freshness": {"warmup_seconds": 0.0},
            "decision_log": {"path": str(folder / "decisions.jsonl"), "every_tick": True},
        }
    )


def _publish(path: Path) -> None:
    budgets = np.arange(_LAYERS, _LAYERS * _TOP_K + 1, dtype=np.int32)
    quotas = (budgets[:, None] + np.arange(_LAYERS)[None]) // _LAYERS
    tables = BudgetTables(
        model_id="bench",
        fingerprint="0" * 64,
        num_experts=_EXPERTS,
        top_k=_TOP_K,
        layer_ids=np.arange(_LAYERS, dtype=np.int32),
        budgets=budgets,
        quotas=quotas.astype(np.int16),
        predicted_loss=np.linspace(0.2, 0.0, len(budgets)).astype(np.float32),
    )
    publish_shared_table(path, tables)


def _page(ranks: int, tick: int) -> str:
    lines = []
    for rank in range(ranks):
        labels = f'engine_type="unified",model_name="bench",dp_rank="{rank}",tp_rank="0"'
        lines += _histogram("time_to_first_token_seconds", labels, 10 * tick)
        lines += _histogram("inter_token_latency_seconds", labels, 400 * tick)
        lines.append(f"sglang:num_queue_reqs{{{labels}}} {float(tick % 7)}")
        lines.append(f"sglang:num_running_reqs{{{labels}}} 32.0")
        other = f'sglang:other_seconds_bucket{{{labels},le="0.5"}} 123456.0'
        lines += [other] * (_OTHER_BYTES_PER_RANK // len(other))
    return "\n".join(lines) + "\n"


def _histogram(name: str, labels: str, events: int) -> list[str]:
    streamed = f'{labels},is_streaming="true"'
    counts = [events * (index + 1) / len(_EDGES) for index in range(len(_EDGES))]
    lines = [
        f'sglang:{name}_bucket{{{streamed},le="{str(edge).replace("inf", "+Inf")}"}} {count}'
        for edge, count in zip(_EDGES, counts, strict=True)
    ]
    return [*lines, f"sglang:{name}_sum{{{streamed}}} {events * 0.1}"]


if __name__ == "__main__":
    main()
