"""Bench: decode and prefill latency against budget, beside stock SGLang or alone.

With stock, two servers of the same model are alive at once, one stock and one with the plugin. Each
round times every budget right beside stock, in alternating order. On a CPU the server that is not
being timed is paused (SIGSTOP), because SGLang polls for requests and an idle one would take a core
from the other.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2

from sglang_alloc.bench.summary import Pair, Row, summarise
from sglang_alloc.bench.timing import (
    Prompts,
    Sizes,
    Timing,
    measure_timings,
    require_room,
    tokenize,
    warm_up,
)
from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.plugin_entry import TABLE_VARIABLE
from sglang_alloc.server_runs.budget_override import BudgetOverride
from sglang_alloc.server_runs.owned_process import pause_group, resume_group
from sglang_alloc.server_runs.progress import Stage, StageProgress
from sglang_alloc.server_runs.server_process import Server, serve
from sglang_alloc.shared_table import SharedTable, TableShape, publish_shared_table
from sglang_alloc.worker_settings import ROUTING_VARIABLE

ONE_BELOW = "one below full"
FRACTIONS = (("5/6", 5 / 6), ("2/3", 2 / 3), ("1/2", 1 / 2), ("1/3", 1 / 3))
START = "starting SGLang"
START_SECONDS, ROUND_SECONDS = 35.0, 30.0  # of one server, on two cores
READY_TIMEOUT_SECONDS = 1800.0  # large checkpoints load for minutes
_ANSWER_TIMEOUT_SECONDS = 600.0
_OVERRIDE_SECONDS = 3600.0

Case = tuple[str, int]
"""Name and budget."""


@dataclass(frozen=True)
class LatencyOptions:
    """What to serve, and what to measure how often.

    `server_arguments` are SGLang's own, of both servers. Without `stock` only the plugin's server
    is started.
    """

    model: Path
    tables: BudgetTables
    texts: tuple[str, ...]
    mode: str
    routing: str
    cases: tuple[Case, ...]
    sizes: Sizes
    server_arguments: tuple[str, ...]
    on_cpu: bool
    stock: bool
    rounds: int
    seed: int
    out: Path


def latency_stages(rounds: int, servers: int) -> list[Stage]:
    """Return the stages for the progress display."""
    each = [Stage(_round_name(number), servers * ROUND_SECONDS) for number in range(rounds)]
    return [Stage(START, servers * START_SECONDS), *each]


def budget_cases(shape: TableShape) -> list[Case]:
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
    """Start the servers, measure all rounds, stop the servers, return a row per case.

    Raises:
        ConfigurationError: the text or the server is too small for a size.
        ProcessDiedError, NotReadyError, ServerRunError: a server did not start, or not answer.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sglang-alloc-")))
        table_path = folder / "bench.tbl"
        publish_shared_table(table_path, options.tables, mode_note=options.mode)
        table = stack.enter_context(contextlib.closing(SharedTable.open(table_path)))
        with progress.stage(START):
            ours = _Timed(stack.enter_context(_started(options, table_path, progress)), options)
            ours.prepare()
            stock = None
            if options.stock:
                stock = _Timed(stack.enter_context(_started(options, None, progress)), options)
                stock.prepare()
        bench = _Bench(ours, stock, table, options, progress)
        for number in range(options.rounds):
            with progress.stage(_round_name(number)):
                bench.run_round(number)
        return summarise(bench.pairs, bench.activations_per_token())


class _Timed:
    """A server that runs only while it is timed, and prompts in its tokens."""

    def __init__(self, server: Server, options: LatencyOptions) -> None:
        self._server, self._options = server, options
        self._tokens: Sequence[int] = ()

    def prepare(self) -> None:
        """Tokenize the text, check the sizes and run each of them once; then pause."""
        with self._client() as client:
            require_room(client, self._options.sizes)
            self._tokens = tokenize(client, self._options.texts)
            warm_up(client, self._options.sizes, self._prompts(self._options.seed))
        if self._options.on_cpu:
            pause_group(self._server.process)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the paused server run for the duration of the block."""
        process = self._server.process
        process.require_alive()
        if not self._options.on_cpu:
            yield
            return
        resume_group(process)
        try:
            yield
        finally:
            process.require_alive()
            pause_group(process)

    def timings(self, seed: int) -> list[Timing]:
        """Time every size; equal seeds give equal prompts."""
        with self._client() as client:
            return measure_timings(client, self._options.sizes, self._prompts(seed))

    def _prompts(self, seed: int) -> Prompts:
        return Prompts(self._tokens, random.Random(seed))

    def _client(self) -> httpx2.Client:
        return httpx2.Client(
            base_url=self._server.url, timeout=_ANSWER_TIMEOUT_SECONDS, trust_env=False
        )


class _Bench:
    """The servers and what was measured on them so far."""

    def __init__(
        self,
        ours: _Timed,
        stock: _Timed | None,
        table: SharedTable,
        options: LatencyOptions,
        progress: StageProgress,
    ) -> None:
        self._ours, self._stock, self._table = ours, stock, table
        self._override = BudgetOverride(table, limit_seconds=_OVERRIDE_SECONDS, actor="bench")
        self._options = options
        self._progress = progress
        self.pairs: list[Pair] = []
        # (case, phase) -> [sampled tokens, their activations]
        self._sampled: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def run_round(self, number: int) -> None:
        """Time every budget beside stock; odd rounds time stock second."""
        beside = "" if self._stock is None else " beside stock"
        for position, (name, budget) in enumerate(self._options.cases):
            self._progress.note(f"budget {budget} ({name}){beside}")
            # Both servers get the same prompts.
            seed = hash((self._options.seed, number, position))
            stock: Sequence[Timing] | None = None
            if self._stock is not None and (number + position) % 2 == 0:
                stock = _timed(self._stock, seed)
            timings = self._timed_at(name, budget, seed)
            if self._stock is not None and stock is None:
                stock = _timed(self._stock, seed)
            for index, mine in enumerate(timings):
                stock_seconds = None if stock is None else stock[index].seconds
                self.pairs.append(Pair(name, budget, *mine[:2], stock_seconds, mine.seconds))

    def activations_per_token(self) -> dict[tuple[str, str], float]:
        """Return the measured mean by (case, phase), where anything was sampled."""
        return {key: acts / tokens for key, (tokens, acts) in self._sampled.items() if tokens}

    def _timed_at(self, name: str, budget: int, seed: int) -> list[Timing]:
        with self._ours.running():
            # A change of budget makes the worker write its counters: an exact cut between cases.
            self._override.set(budget, budget)
            before = self._table.worker_counters()[0]
            timings = self._ours.timings(seed)
            self._override.set(*_another(budget, self._table.shape))
            after = self._table.worker_counters()[0]
        for phase in ("prefill", "decode"):
            sampled = self._sampled[name, phase]
            for slot, what in enumerate(("tokens", "activations")):
                field = f"sampled_{phase}_{what}"
                sampled[slot] += getattr(after, field) - getattr(before, field)
        return timings


def _timed(server: _Timed, seed: int) -> list[Timing]:
    with server.running():
        return server.timings(seed)


def _another(budget: int, shape: TableShape) -> tuple[int, int]:
    other = shape.budget_max if budget != shape.budget_max else shape.budget_min
    return other, other


def _started(
    options: LatencyOptions, table: Path | None, progress: StageProgress
) -> contextlib.AbstractContextManager[Server]:
    # A table that the caller's environment names would end stock's being stock.
    env = {TABLE_VARIABLE: ""} if table is None else {ROUTING_VARIABLE: options.routing}
    return serve(
        options.model,
        ready_timeout_seconds=READY_TIMEOUT_SECONDS,
        on_wait=progress.note,
        table=table,
        mode=None if table is None else options.mode,
        extra_args=options.server_arguments,
        on_cpu=options.on_cpu,
        env=env,
        log_path=options.out / f"{'stock' if table is None else 'plugin'}.log",
    )


def _round_name(number: int) -> str:
    return f"round {number + 1}"
