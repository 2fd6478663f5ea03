"""Demo, step 3: one run of the trace, with the server's gauges and the budgets beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from sglang_alloc.demo.load import RequestRecord, offer_load
from sglang_alloc.demo.trace import Trace
from sglang_alloc.server_runs.served_steps import Step, read_steps
from sglang_alloc.shared_table import SharedTable, WorkerCounters

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
    """The budgets of busy steps, or those of calm ones, from `second` on."""

    second: float
    prefill_budget: int
    decode_budget: int


@dataclass(frozen=True)
class RunRecord:
    """Everything that one run of the trace left behind.

    `budgets` are those that the leading rank acknowledged, which busy steps obey, `calm_budgets`
    what it gives calm ones. Steps begin so many seconds after the start of the run.
    """

    trace: Trace
    requests: tuple[RequestRecord, ...]
    gauges: tuple[GaugeSample, ...]
    budgets: tuple[BudgetInForce, ...]
    calm_budgets: tuple[BudgetInForce, ...]
    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        """Time from the start to the last answer, at least the trace's own length."""
        finished = [request.finished_second for request in self.requests]
        return max([self.trace.seconds, *finished])


def observe_run(
    url: str,
    trace: Trace,
    table: SharedTable,
    step_record: Path,
    on_tick: Callable[[float, int, int], None],
) -> RunRecord:
    """Send the trace to `url` and watch the server and the table while it runs.

    What the server did meanwhile is read from its `step_record` afterwards.
    `on_tick(second, sent, finished)` is called twice a second; what it raises ends the run.
    """
    return asyncio.run(_observe(url, trace, table, step_record, on_tick))


async def _observe(
    url: str,
    trace: Trace,
    table: SharedTable,
    step_record: Path,
    on_tick: Callable[[float, int, int], None],
) -> RunRecord:
    gauges: list[GaugeSample] = []
    budgets: list[BudgetInForce] = []
    calm_budgets: list[BudgetInForce] = []
    started = time.monotonic()
    watchers = [
        asyncio.create_task(_watch_gauges(url, started, gauges)),
        asyncio.create_task(_watch_budgets(table, started, budgets, calm_budgets)),
    ]
    try:
        requests = await offer_load(url, trace, on_tick=on_tick)
    finally:
        for watcher in watchers:
            watcher.cancel()
    steps = _steps_since(started, step_record)
    return RunRecord(
        trace, tuple(requests), tuple(gauges), tuple(budgets), tuple(calm_budgets), steps
    )


def _steps_since(started: float, step_record: Path) -> tuple[Step, ...]:
    return tuple(
        step._replace(begun_seconds=step.begun_seconds - started)
        for step in read_steps(step_record)
        if step.begun_seconds >= started
    )


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


async def _watch_budgets(
    table: SharedTable,
    started: float,
    budgets: list[BudgetInForce],
    calm_budgets: list[BudgetInForce],
) -> None:
    while True:
        ranks = table.worker_counters()
        if ranks:
            second = time.monotonic() - started
            acknowledged = (ranks[0].prefill_budget, ranks[0].decode_budget)
            _note_change(budgets, second, acknowledged)
            _note_change(calm_budgets, second, calm_in_force(table, ranks[0]) or acknowledged)
        await asyncio.sleep(BUDGETS_EVERY_SECONDS)


def _note_change(entries: list[BudgetInForce], second: float, pair: tuple[int, int]) -> None:
    if not entries or entries[-1][1:] != pair:
        entries.append(BudgetInForce(second, *pair))


def calm_in_force(table: SharedTable, rank: WorkerCounters) -> tuple[int, int] | None:
    """Return the budgets of the rank's calm steps, or None: they have those of all others.

    The controller writes them for the generation that it asks for; a rank that follows another one,
    an override or its fallback has none.
    """
    calm = table.calm_budgets()
    if calm is None or not rank.follows_controller(table.selector().generation):
        return None
    return calm.prefill_budget, calm.decode_budget
