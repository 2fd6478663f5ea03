"""What a server and its controller say to a scraper, for tests that have neither running.

SGLang's text was recorded from a real SGLang 0.5.23 that served streaming requests; the worker's
and the controller's come from the classes that export them in production.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from sglang_alloc.shared_table import CalmBudgets, WorkerCounters
from sglang_alloc_controller.law_state import Reason
from sglang_alloc_controller.own_metrics import OwnMetrics
from sglang_alloc_controller.reading_history import Sample
from sglang_alloc_controller.samples import PHASES, InputState, Phase
from sglang_alloc_controller.settings import SloSettings
from sglang_alloc_controller.tick_report import CalmReport, TickReport

HERE = Path(__file__).resolve().parent
RECORDED_SGLANG = HERE / "fixtures" / "sglang_0_5_23_metrics.txt"
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(\{.*\})? (\S+)$", re.MULTILINE)
_GROWING = re.compile(r"(_bucket|_count|_sum|_total)$")


def sglang_text(scrape: int = 1) -> str:
    """Return the recorded metrics as if the recorded minute had happened `scrape` times."""

    def grown(match: re.Match[str]) -> str:
        name, labels, value = match.group(1), match.group(2) or "", match.group(3)
        growing = _GROWING.search(name) is not None
        return f"{name}{labels} {float(value) * scrape if growing else value}"

    return _SAMPLE.sub(grown, RECORDED_SGLANG.read_text(encoding="utf-8"))


def underscored(text: str) -> str:
    """Return `text` as a Prometheus 2 that negotiated OpenMetrics stores it."""
    return text.replace("sglang:", "sglang_")


@cache
def worker_text() -> str:
    """Return the metrics that the plugin adds to SGLang's own."""
    result = subprocess.run(
        [sys.executable, str(HERE / "worker_exposition.py")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PROMETHEUS_DISABLE_CREATED_SERIES": "true"},
    )
    lines = result.stdout.splitlines(keepends=True)
    return "".join(line for line in lines if "sglang_alloc" in line)


def controller_text(ticks: int = 1) -> str:
    """Return the controller's metrics after `ticks` ticks under load, the decode budget lowered."""
    metrics = OwnMetrics("control", SloSettings(ttft_seconds=2.0, itl_seconds=0.1))
    for _ in range(ticks):
        metrics.report(_busy_tick())
    metrics.report_tick_seconds(0.002)
    return metrics.text().decode()


def metric_names(text: str) -> set[str]:
    """Return the names of all samples of an exposition, histogram suffixes included."""
    return {match.group(1) for match in _SAMPLE.finditer(text)}


def _busy_tick() -> TickReport:
    sample = Sample(
        events=200.0,
        independent_events=40.0,
        within_ratio=0.93,
        mean_seconds=0.05,
        quantile_seconds=0.12,
        rate_per_second=20.0,
        span_seconds=10.0,
    )
    full: dict[Phase, int] = dict.fromkeys(PHASES, 8)
    lowered: dict[Phase, int] = {"prefill": 8, "decode": 6}
    worker = WorkerCounters(*[0] * len(WorkerCounters._fields))._replace(
        pid=1, acknowledged_generation=7, prefill_budget=8, decode_budget=6
    )
    return TickReport(
        input_state=InputState.VALID,
        samples={"ttft": sample, "itl": sample},
        queue_requests=3.0,
        running_requests=8.0,
        sample_age_seconds=0.4,
        reasons={"prefill": Reason.AT_CEILING, "decode": Reason.ITL_SLO},
        burn_ratios={"prefill": 0.4, "decode": 1.4},
        excesses={"prefill": 0.0, "decode": 0.4},
        desired=lowered,
        written_before=full,
        written=lowered,
        generation=7,
        override=None,
        worker=worker,
        floors=dict.fromkeys(PHASES, 4),
        ceilings=full,
        predicted_losses={"prefill": 0.0, "decode": 0.011},
        saturation_ratio=0.4,
        source_failures_total=0,
        source_error=None,
        below_full=True,
        calm=CalmReport(
            desired=CalmBudgets(8, 7, 28),
            written=CalmBudgets(8, 7, 28),
            predicted_losses={"prefill": 0.0, "decode": 0.002},
            ratios={"prefill": 0.95, "decode": 0.8},
            was_busy=dict.fromkeys(PHASES, True),
        ),
    )
