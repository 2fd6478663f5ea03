"""Bench: decode and prefill latency against budget, in turns with stock SGLang.

Two servers of the same model are alive at once, one stock and one with the plugin. Each round times
every budget right beside stock, in alternating order; the server that is not being timed is paused
(SIGSTOP), because SGLang polls for requests and an idle one would take a core from the other.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

from sglang_alloc.bench.summary import Pair, Row, summarise
from sglang_alloc.bench.timing import Timing, measure_timings
from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.server_runs.budget_override import BudgetOverride
from sglang_alloc.server_runs.owned_process import pause_group, resume_group
from sglang_alloc.server_runs.progress import Stage, StageProgress
from sglang_alloc.server_runs.server_process import Server, serve
from sglang_alloc.shared_table import SharedTable, TableShape, publish_shared_table

ONE_BELOW = "one below full"
FRACTIONS = (("5/6", 5 / 6), ("2/3", 2 / 3), ("1/2", 1 / 2), ("1/3", 1 / 3))
SERVER_ARGUMENTS = ("--dtype", "float32", "--disable-radix-cache")
START = "starting two servers"
ROUND_SECONDS = 60.0


@dataclass(frozen=True)
class LatencyOptions:
    """What to serve and how often to measure."""

    model: Path
    tables: Path
    texts: tuple[str, ...]
    mode: str
    rounds: int
    seed: int
    out: Path


def latency_stages(rounds: int) -> list[Stage]:
    """Return the stages for the progress display."""
    return [Stage(START, 70.0), *(Stage(_round_name(i), ROUND_SECONDS) for i in range(rounds))]


def budget_cases(shape: TableShape) -> list[tuple[str, int]]:
    """Return (name, budget): full, the fractions that the table holds, and its smallest budget.

    One below full drops next to nothing: its distance from full is what our code for kept slots
    costs or saves by itself, before any expert is spared.
    """
    cases = [("full", shape.budget_max)]
    if shape.budget_max - 1 > shape.budget_min:
        cases.append((ONE_BELOW, shape.budget_max - 1))
    for name, fraction in FRACTIONS:
        budget = round(fraction * shape.budget_max)
        if shape.budget_min < budget < shape.budget_max - 1:
            cases.append((name, budget))
    if shape.budget_min < shape.budget_max:
        cases.append(("minimum", shape.budget_min))
    return cases


def measure_latency(options: LatencyOptions, progress: StageProgress) -> list[Row]:
    """Start both servers, measure all rounds, stop the servers, return a row per case."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sglang-alloc-")))
        table_path = folder / "bench.tbl"
        publish_shared_table(table_path, load_budget_tables(options.tables))
        with progress.stage(START):
            ours = stack.enter_context(_started(options, table_path, progress.note))
            pause_group(ours.process)
            stock = stack.enter_context(_started(options, None, progress.note))
            pause_group(stock.process)
        table = stack.enter_context(contextlib.closing(SharedTable.open(table_path)))
        bench = _Bench(ours, stock, table, options, progress)
        for number in range(options.rounds):
            with progress.stage(_round_name(number)):
                bench.run_round(number)
        return summarise(bench.pairs, bench.activations_per_token())


class _Bench:
    """The two servers and what was measured on them so far."""

    def __init__(
        self,
        ours: Server,
        stock: Server,
        table: SharedTable,
        options: LatencyOptions,
        progress: StageProgress,
    ) -> None:
        self._ours, self._stock, self._table = ours, stock, table
        self._override = BudgetOverride(table)
        self._options = options
        self._progress = progress
        self.pairs: list[Pair] = []
        # (case, phase) -> [sampled tokens, their activations]
        self._sampled: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def run_round(self, number: int) -> None:
        """Time every budget beside stock; odd rounds time stock second."""
        for position, (name, budget) in enumerate(budget_cases(self._table.shape)):
            self._progress.note(f"budget {budget} ({name}) beside stock")
            # Both servers get the same prompts.
            seed = hash((self._options.seed, number, position))
            if (number + position) % 2 == 0:
                stock = self._timed(self._stock, seed)
                timings = self._timed_at(name, budget, seed)
            else:
                timings = self._timed_at(name, budget, seed)
                stock = self._timed(self._stock, seed)
            for theirs, mine in zip(stock, timings, strict=True):
                self.pairs.append(Pair(name, budget, *mine[:2], theirs.seconds, mine.seconds))

    def activations_per_token(self) -> dict[tuple[str, str], float]:
        """Return the measured mean by (case, phase), where anything was sampled."""
        return {key: acts / tokens for key, (tokens, acts) in self._sampled.items() if tokens}

    def _timed(self, server: Server, seed: int) -> list[Timing]:
        with _running(server), _client(server) as client:
            return measure_timings(client, self._options.texts, random.Random(seed))

    def _timed_at(self, name: str, budget: int, seed: int) -> list[Timing]:
        with _running(self._ours), _client(self._ours) as client:
            # A change of budget makes the worker write its counters: an exact cut between cases.
            self._override.set(budget, budget)
            before = self._table.worker_counters()[0]
            timings = measure_timings(client, self._options.texts, random.Random(seed))
            self._override.set(*_another(budget, self._table.shape))
            after = self._table.worker_counters()[0]
        for phase in ("prefill", "decode"):
            sampled = self._sampled[name, phase]
            for slot, what in enumerate(("tokens", "activations")):
                field = f"sampled_{phase}_{what}"
                sampled[slot] += getattr(after, field) - getattr(before, field)
        return timings


def _another(budget: int, shape: TableShape) -> tuple[int, int]:
    other = shape.budget_max if budget != shape.budget_max else shape.budget_min
    return other, other


@contextlib.contextmanager
def _running(server: Server) -> Iterator[None]:
    """Let a paused server run for the duration of the block."""
    server.process.require_alive()
    resume_group(server.process)
    try:
        yield
    finally:
        server.process.require_alive()
        pause_group(server.process)


def _client(server: Server) -> httpx2.Client:
    return httpx2.Client(base_url=server.url, timeout=120.0, trust_env=False)


def _started(
    options: LatencyOptions, table: Path | None, note: Callable[[str], None]
) -> contextlib.AbstractContextManager[Server]:
    name = "stock" if table is None else "plugin"
    return serve(
        options.model,
        table=table,
        mode=None if table is None else options.mode,
        extra_args=SERVER_ARGUMENTS,
        log_path=options.out / f"{name}.log",
        on_wait=note,
    )


def _round_name(number: int) -> str:
    return f"round {number + 1}"
