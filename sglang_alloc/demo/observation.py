"""Demo, step 3: one run of the trace, with the server's gauges and the budgets beside it."""

from __future__ import annotations

import asyncio
import bisect
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import httpx2

from sglang_alloc.demo.load import RequestRecord, offer_load
from sglang_alloc.demo.trace import Trace
from sglang_alloc.shared_table import SharedTable

METRICS_EVERY_SECONDS = 1.0
# The rank acknowledges a change within a scheduler iteration; reading its slot costs microseconds.
BUDGETS_EVERY_SECONDS = 0.05
_GAUGE_LINE = re.compile(
    r"^sglang[:_](num_queue_reqs|num_running_reqs|gen_throughput)(?:\{[^}]*\})? (\S+)", re.MULTILINE
)


class GaugeSample(NamedTuple):
    """What a scrape of the server's /metrics said, `second` after the start of the run."""

    second: float
    queue_requests: float
    running_requests: float


class BudgetInForce(NamedTuple):
    """The budgets that the leading rank acknowledged from `second` on."""

    second: float
    prefill_budget: int
    decode_budget: int


@dataclass(frozen=True)
class RunRecord:
    """Everything that one run of the trace left behind."""

    trace: Trace
    requests: tuple[RequestRecord, ...]
    gauges: tuple[GaugeSample, ...]
    budgets: tuple[BudgetInForce, ...]

    def budgets_at(self, second: float) -> BudgetInForce:
        """Return the budgets in force at `second` (the first ones, before the first look)."""
        position = bisect.bisect_right([entry.second for entry in self.budgets], second) - 1
        return self.budgets[max(position, 0)]

    @property
    def seconds(self) -> float:
        """Time from the start to the last answer, at least the trace's own length."""
        finished = [request.finished_second for request in self.requests]
        return max([self.trace.seconds, *finished])


def observe_run(
    url: str,
    trace: Trace,
    table: SharedTable,
    on_tick: Callable[[float, int, int], None],
) -> RunRecord:
    """Send the trace to `url` and watch the server and the table while it runs.

    `on_tick(second, sent, finished)` is called twice a second; what it raises ends the run.
    """
    return asyncio.run(_observe(url, trace, table, on_tick))


async def _observe(
    url: str,
    trace: Trace,
    table: SharedTable,
    on_tick: Callable[[float, int, int], None],
) -> RunRecord:
    gauges: list[GaugeSample] = []
    budgets: list[BudgetInForce] = []
    started = time.monotonic()
    watchers = [
        asyncio.create_task(_watch_gauges(url, started, gauges)),
        asyncio.create_task(_watch_budgets(table, started, budgets)),
    ]
    try:
        requests = await offer_load(url, trace, on_tick=on_tick)
    finally:
        for watcher in watchers:
            watcher.cancel()
    return RunRecord(trace, tuple(requests), tuple(gauges), tuple(budgets))


async def _watch_gauges(url: str, started: float, gauges: list[GaugeSample]) -> None:
    async with httpx2.AsyncClient(base_url=url, timeout=5.0, trust_env=False) as client:
        while True:
            second = time.monotonic() - started
            text = await _scrape(client)
            if text is not None:
                gauges.append(parse_gauges(second, text))
            await asyncio.sleep(
                max(0.0, second + METRICS_EVERY_SECONDS + started - time.monotonic())
            )


async def _scrape(client: httpx2.AsyncClient) -> str | None:
    """Return the exposition, or None: a scrape that fails is a gap in a plot, not an error."""
    try:
        response = await client.get("/metrics")
    except httpx2.TransportError:
        return None
    return response.text if response.status_code == 200 else None


def parse_gauges(second: float, exposition: str) -> GaugeSample:
    """Read the gauges out of a Prometheus exposition; a gauge that is not there yet counts 0."""
    values = {"num_queue_reqs": 0.0, "num_running_reqs": 0.0}
    for name, value in _GAUGE_LINE.findall(exposition):
        values[name] = values.get(name, 0.0) + float(value)
    return GaugeSample(second, values["num_queue_reqs"], values["num_running_reqs"])


async def _watch_budgets(table: SharedTable, started: float, budgets: list[BudgetInForce]) -> None:
    while True:
        ranks = table.worker_counters()
        if ranks:
            now = BudgetInForce(
                time.monotonic() - started, ranks[0].prefill_budget, ranks[0].decode_budget
            )
            if not budgets or budgets[-1][1:] != now[1:]:
                budgets.append(now)
        await asyncio.sleep(BUDGETS_EVERY_SECONDS)
