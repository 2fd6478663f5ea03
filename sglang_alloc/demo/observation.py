"""Demo, step 3: one run of the trace, with the server's gauges and the budgets beside it."""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx2

from sglang_alloc.demo.load import RequestRecord, offer_load
from sglang_alloc.demo.trace import Trace
from sglang_alloc.shared_table import SharedTable

# Rendering /metrics takes SGLang some 50 ms on the cores that it serves from, and its /v1/loads
# less than 4: the controller needs the one, this observer only the other.
METRICS_EVERY_SECONDS, LOADS_EVERY_SECONDS = 1.0, 1.0
LOADS_PATH = "/v1/loads?include=core"
# The rank acknowledges a change within a scheduler iteration; reading its slot costs microseconds.
BUDGETS_EVERY_SECONDS = 0.05


class GaugeSample(NamedTuple):
    """What the server's /v1/loads said, `second` after the start of the run."""

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
            answer = await _loads(client)
            if answer is not None:
                gauges.append(sum_loads(second, answer))
            await asyncio.sleep(max(0.0, second + LOADS_EVERY_SECONDS + started - time.monotonic()))


async def _loads(client: httpx2.AsyncClient) -> dict[str, Any] | None:
    """Return the answer, or None: a look that fails is a gap in a plot, not an error."""
    try:
        response = await client.get(LOADS_PATH)
        answer: dict[str, Any] = response.raise_for_status().json()
    except (httpx2.HTTPError, ValueError):
        return None
    return answer


def sum_loads(second: float, answer: Mapping[str, Any]) -> GaugeSample:
    """Add up the ranks of an answer of /v1/loads; one that published nothing yet counts 0."""
    ranks = answer.get("loads", ())
    return GaugeSample(
        second,
        float(sum(rank["num_waiting_reqs"] for rank in ranks)),
        float(sum(rank["num_running_reqs"] for rank in ranks)),
    )


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
