"""What the controller costs: CPU time of a tick and of a reading, and resident memory.

    python controller/bench/tick.py [--ranks 8] [--ticks 400]

The page is that of an engine with `--ranks` ranks: 0.7 MB at 8, as SGLang 0.5.23 writes it with
about 90 kB of other metrics per rank. The budget tables have 1,409 budgets of 94 layers. Each tick
gets a new reading, twice what happens in service. Prints one JSON line.
"""

import argparse
import itertools
import json
import logging
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import structlog

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.shared_table import publish_shared_table
from sglang_alloc_controller.decision_log import DecisionLog
from sglang_alloc_controller.loop import ControlLoop, Surroundings
from sglang_alloc_controller.own_metrics import OwnMetrics
from sglang_alloc_controller.settings import Settings, parse_settings
from sglang_alloc_controller.sglang_metrics import parse_metrics
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
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(Path(folder), arguments.ranks, arguments.ticks)))


def _measure(folder: Path, ranks: int, ticks: int) -> dict[str, float]:
    settings = _settings(folder)
    _publish(Path(settings.table))
    metrics = OwnMetrics(settings.mode, settings.slo)
    now_ns = itertools.count(1000 * _NANOSECONDS, _NANOSECONDS // 2)
    observation = Observation(None, 0, None)
    loop = ControlLoop(
        settings,
        TableLink(Path(settings.table), lambda table: None),
        metrics,
        DecisionLog(settings.decision_log, metrics.count_log_error),
        Surroundings(lambda: observation, lambda: next(now_ns), lambda seconds: False),
    )
    parse_seconds, tick_seconds, scrape_seconds = [], [], []
    for tick in range(ticks):
        page, at_seconds = _page(ranks, tick), 1000.0 + tick / 2
        reading, seconds = _timed(partial(parse_metrics, page, at_seconds, settings.source))
        parse_seconds.append(seconds)
        observation = Observation(reading, 0, None)
        tick_seconds.append(_timed(loop.tick)[1])
        scrape_seconds.append(_timed(metrics.text)[1])
    return {
        "ranks": ranks,
        "page_bytes": len(page),
        "tick_ms_median": 1e3 * statistics.median(tick_seconds),
        "tick_ms_p99": 1e3 * statistics.quantiles(tick_seconds, n=100)[98],
        "parse_ms_median": 1e3 * statistics.median(parse_seconds),
        "scrape_ms_median": 1e3 * statistics.median(scrape_seconds),
        "resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    started = time.thread_time()
    result = call()
    return result, time.thread_time() - started


def _settings(folder: Path) -> Settings:
    return parse_settings(
        {
            "table": str(folder / "bench.tbl"),
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
