"""What the controller costs: CPU time of a tick and of a reading, and resident memory.

    python controller/bench/tick.py [--ranks 8] [--ticks 2000]

A server process of its own shows /metrics and /v1/loads of an engine with `--ranks` ranks: 0.7 MB
at 8, as SGLang 0.5.23 writes it with about 90 kB of other metrics per rank. Readings
come over HTTP.
The budget tables have 1,411 budgets of 94 layers. Each tick gets a new reading, twice what happens
in service, keeps a point for the live page and writes a line of the decision log. The load rises
and falls, between a third and five thirds of its mean, and 2,000 ticks fill the longest of the
windows that it is counted over. Prints one JSON line for the law that goes by latencies, and one
for the law that looks ahead with a cost model of 12 budgets and 12 sizes of each phase; each is
measured in a process of its own.
"""

import argparse
import itertools
import json
import logging
import math
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
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

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
# Of each rank. At its peak the load is more than full budget carries.
_REQUESTS_PER_TICK, _PROMPT_TOKENS, _OUTPUT_TOKENS, _BATCH = 18, 512, 40, 32
_LEVELS = 12
_LAWS = _LATENCIES, _AHEAD = ("latencies", "looking ahead")
_NANOSECONDS = 1_000_000_000
_Result = TypeVar("_Result")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--ticks", type=int, default=2000)
    arguments = parser.parse_args()
    for law in _LAWS:
        server, port = _started(_serve, arguments.ranks)
        measured, figures = _started(_measure, law, port, arguments.ranks, arguments.ticks)
        print(json.dumps(figures))
        measured.join()
        server.kill()


def _started(target: Callable[..., None], *arguments: object) -> tuple[SpawnProcess, Any]:
    """Start a process that begins with a connection; return it and what it sends first."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()  # else a process that fails would be waited for for ever
    return process, ours.recv()


def _measure(told: Connection, law: str, port: int, ranks: int, ticks: int) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(Path(folder), port, law)
        _publish(Path(settings.table))
        told.send({"law": law, "ranks": ranks, **_measured(settings, ranks, ticks)})


def _measured(settings: Settings, ranks: int, ticks: int) -> dict[str, float]:
    metrics = OwnMetrics(settings.mode, settings.slo)
    history = PageHistory(lambda: settings)
    source = SGLangMetrics(settings.source, time.monotonic)
    now_ns = itertools.count(1000 * _NANOSECONDS, _NANOSECONDS // 2)
    observation = Observation(None, 0, None)
    around = Surroundings(
        lambda: observation, lambda: next(now_ns), lambda seconds: False, show=history.add
    )
    link = TableLink(Path(settings.table), lambda table: None)
    first = link.selector().generation
    loop = ControlLoop(
        settings,
        link,
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
        "changes": link.selector().generation - first,
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
    scrapes = itertools.count()  # of both pages in turn

    class Request(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            is_loads = self.path.startswith("/v1/loads")
            number = next(scrapes) // 2
            body = _loads(ranks, number) if is_loads else _page(ranks, number)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Request)
    told.send(server.server_address[1])
    server.serve_forever()


def _requests(tick: int) -> int:
    """Return what a rank has answered by then; a wave goes over the rate in about 190 seconds."""
    return round(_REQUESTS_PER_TICK * (tick + 40 * math.sin(tick / 60)))


def _loads(ranks: int, tick: int) -> str:
    now, requests = datetime.now(timezone.utc), _requests(tick)
    prefill_tokens, decode_tokens = requests * _PROMPT_TOKENS, requests * _OUTPUT_TOKENS
    steps = decode_tokens / _BATCH
    microseconds = 1e6 * steps * _decode_seconds(_BATCH)
    load = {
        "timestamp": now.timestamp(),
        "num_running_reqs": _BATCH,
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
        "total_prefill_uncached_tokens": prefill_tokens,
        "total_prefill_busy_us": 1e6 * _prefill_seconds(prefill_tokens),
        "decode_moments": [
            *(steps, decode_tokens, microseconds, _BATCH * decode_tokens, _BATCH * microseconds),
            decode_tokens,
        ],
    }
    loads = [{**load, "dp_rank": rank} for rank in range(ranks)]
    return json.dumps({"timestamp": now.isoformat(), "version": "0.5.23", "loads": loads})


def _timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    started = time.thread_time()
    result = call()
    return result, time.thread_time() - started


def _prefill_seconds(tokens: float, share: float = 1.0) -> float:
    return 1.5e-5 * tokens * (0.4 + 0.6 * share)


def _decode_seconds(batch: float, share: float = 1.0) -> float:
    return (0.008 + 3e-4 * batch) * (0.4 + 0.6 * share)


def _settings(folder: Path, port: int, law: str) -> Settings:
    cost_model = _write_cost_model(folder / "costs.csv") if law == _AHEAD else None
    return parse_settings(
        {
            "table": str(folder / "bench.tbl"),
            "source": {"url": f"http://127.0.0.1:{port}", "timeout_seconds": 60.0},
            "slo": {"ttft_seconds": 1.0, "itl_seconds": 0.05},
            "quality": {"cost_model": cost_model},
            "freshness": {"warmup_seconds": 0.0},
            "decision_log": {"path": str(folder / "decisions.jsonl"), "every_tick": True},
        }
    )


def _write_cost_model(path: Path) -> str:
    full = _LAYERS * _TOP_K
    lines = ["phase,concurrency,budget,prefill_prompt_tokens,median_ms"]
    for budget in np.linspace(_LAYERS, full, _LEVELS).round().astype(int).tolist():
        share = budget / full
        for size in range(1, _LEVELS + 1):
            prefill, decode = _prefill_seconds(512 * size, share), _decode_seconds(8 * size, share)
            lines.append(f"prefill,{size},{budget},512,{1e3 * prefill}")
            lines.append(f"decode,{8 * size},{budget},,{1e3 * decode}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


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
    lines, requests = [], _requests(tick)
    for rank in range(ranks):
        labels = f'engine_type="unified",model_name="bench",dp_rank="{rank}",tp_rank="0"'
        tokens = requests * _OUTPUT_TOKENS
        lines += _histogram("time_to_first_token_seconds", labels, requests, mean_seconds=0.25)
        lines += _histogram("inter_token_latency_seconds", labels, tokens, mean_seconds=0.012)
        lines.append(f"sglang:num_queue_reqs{{{labels}}} {float(tick % 4)}")
        lines.append(f"sglang:num_running_reqs{{{labels}}} {_BATCH}.0")
        for mode, count in (("prefill_compute", requests * _PROMPT_TOKENS), ("decode", tokens)):
            lines.append(f'sglang:realtime_tokens_total{{{labels},mode="{mode}"}} {count}.0')
        other = f'sglang:other_seconds_bucket{{{labels},le="0.5"}} 123456.0'
        lines += [other] * (_OTHER_BYTES_PER_RANK // len(other))
    return "\n".join(lines) + "\n"


def _histogram(name: str, labels: str, events: int, mean_seconds: float) -> list[str]:
    """Return the lines of latencies that are exponentially distributed."""
    streamed = f'{labels},is_streaming="true"'
    counts = [round(events * -math.expm1(-edge / mean_seconds)) for edge in _EDGES]
    lines = [
        f'sglang:{name}_bucket{{{streamed},le="{str(edge).replace("inf", "+Inf")}"}} {count}.0'
        for edge, count in zip(_EDGES, counts, strict=True)
    ]
    return [*lines, f"sglang:{name}_sum{{{streamed}}} {events * mean_seconds}"]


if __name__ == "__main__":
    main()
