"""Bench, whole steps: real SGLang servers with dummy weights, stock beside modes, over HTTP.

All servers of a round hold their weights at once and are measured in turn, so that what changes on
the machine meets them alike. Requests carry token ids, drawn anew for each batch. A decode step is
the difference between long and short answers, so that HTTP and prefill cancel; prefill is the time
until the first tokens.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from moe_bench.batches import client_of, generate
from moe_bench.budgets import FRACTIONS, MODES
from moe_bench.dummy_models import even_tables, threshold_tables, write_model
from moe_bench.measure import Row
from moe_bench.results import STOCK
from moe_bench.step_profile import ProfileCsv, profile_step
from sglang_alloc.server_runs.budget_override import BudgetOverride
from sglang_alloc.server_runs.server_process import Server, started_server, wait_until_ready
from sglang_alloc.shared_table import SharedTable, publish_shared_table
from sglang_alloc.worker_settings import ROUTING_VARIABLE

CONCURRENCIES = (1, 8, 16, 32, 64, 128, 256, 512)
PREFILL_TOKENS = (1024, 4096, 16384)
DECODE_STEPS, PROMPT_TOKENS, REPEATS = 128, 32, 5
FIT_REQUESTS, FIT_TOKENS, FIT_STEPS = 16, 32, 5
READY_SECONDS = 900.0
# A mode with this behind it: our kernel routes and drops at once.
FUSED = "+fused"
# A budget besides: in every layer each token's best slot, which in `union` opens the set.
SERVED_FRACTIONS = FRACTIONS | {"top-1": 0.0}
SERVED_MODES = (*MODES, *(f"{mode}{FUSED}" for mode in MODES))
GPU_ARGUMENTS = (
    *("--device", "cuda"),
    *("--attention-backend", "triton"),
    *("--sampling-backend", "pytorch"),
    *("--moe-runner-backend", "triton"),
    *("--mem-fraction-static", "0.95"),  # of what the servers started before it left
)
GPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "0"}
DUMMY_ARGUMENTS = (
    *("--load-format", "dummy"),
    *("--grammar-backend", "none"),
    "--skip-tokenizer-init",
    "--disable-radix-cache",
    "--skip-server-warmup",
    "--sleep-on-idle",  # the servers beside it leave the cores to the one that is measured
)


class ServerPlan(NamedTuple):
    """What to serve and how much to measure; the defaults are for a GPU.

    `beside` modes are served at once beside stock: each holds the model's weights once more.
    `profile` gets where the time of the first decode case goes, kernel by kernel.
    """

    arguments: Sequence[str] = GPU_ARGUMENTS
    environment: Mapping[str, str] = GPU_ENVIRONMENT
    model_changes: Mapping[str, Any] = {}
    modes: Sequence[str] = SERVED_MODES
    fractions: Mapping[str, float] = SERVED_FRACTIONS
    concurrencies: Sequence[int] = CONCURRENCIES
    prefill_tokens: Sequence[int] = PREFILL_TOKENS
    decode_steps: int = DECODE_STEPS
    repeats: int = REPEATS
    beside: int = 1
    profile: ProfileCsv | None = None
    has_graphs: bool = True

    def cases(self) -> list[Case]:
        """Return what is timed."""
        decode = [Case("decode", size) for size in self.concurrencies]
        return [*decode, *(Case("prefill", size) for size in self.prefill_tokens)]

    def profiles(self, case: Case) -> bool:
        """Return whether the steps of a case are profiled."""
        first = Case("decode", next(iter(self.concurrencies), 0))
        return self.profile is not None and case == first

    def modes_left(self, is_left: IsLeft) -> list[str]:
        """Return the modes that miss a row."""
        return [
            mode
            for mode in self.modes
            if any(is_left(mode, case, name) for case in self.cases() for name in self.fractions)
        ]

    def server_arguments(self) -> list[str]:
        """Return SGLang's arguments: room and captured graphs for just what is timed."""
        given = [*self.arguments, *DUMMY_ARGUMENTS]
        largest = max(self.concurrencies, default=1)
        tokens = max(self.prefill_tokens, default=0)
        answers = largest * (PROMPT_TOKENS + self.decode_steps + 1)
        given += ["--max-running-requests", str(largest)]
        # Twice, for a batch that comes while the last one's room is being given back.
        given += ["--max-total-tokens", str(4096 + 2 * max(answers, tokens))]
        if not self.has_graphs:
            return given
        given += ["--chunked-prefill-size", str(max(tokens, 8192))]
        given += [
            "--cuda-graph-bs-decode",
            *(str(size) for size in sorted({1, *self.concurrencies})),
        ]
        if self.prefill_tokens:
            given += [
                "--cuda-graph-bs-prefill",
                *(str(size) for size in sorted(self.prefill_tokens)),
            ]
        return given


class Case(NamedTuple):
    """One thing to time: `decode` at a concurrency or `prefill` of a number of tokens."""

    kind: str
    size: int


ON_GPU = ServerPlan()
# The small model, to see that this works: a CPU's times say nothing of a GPU's.
ON_CPU = ServerPlan(
    (),
    {},
    {},
    modes=MODES,
    fractions=FRACTIONS,
    concurrencies=(1, 8),
    prefill_tokens=(256,),
    decode_steps=16,
    repeats=3,
    has_graphs=False,
)


IsLeft = Callable[[str, Case, str], bool]  # whether a mode's case at a budget is wanted


class Budgeted(NamedTuple):
    """A server of a mode, and the shared table that its budgets are set in."""

    mode: str
    server: Server
    table: SharedTable


class Times(NamedTuple):
    """Seconds of each repeat: of stock, and of each mode in turn with it."""

    stock: list[float]
    modes: dict[str, list[float]]


def measure_server(
    shape_name: str, plan: ServerPlan, is_left: IsLeft, log_folder: Path
) -> Iterator[list[Row]]:
    """Serve the model stock beside its modes; yield each case's rows that are left.

    `server decode` has a row's time per step, `server prefill` per batch of one prompt. Each row's
    speedup is over stock in turn with it; stock's own row has all repeats beside these modes.
    """
    modes_left = plan.modes_left(is_left)
    fitted: dict[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory(prefix="sglang-alloc-") as scratch:
        model = write_model(Path(scratch) / shape_name, shape_name, **plan.model_changes)
        for start in range(0, len(modes_left), plan.beside):
            modes = modes_left[start : start + plan.beside]
            with ExitStack() as stack:
                stock, budgeted = serve_together(stack, model, modes, plan, log_folder)
                for case in plan.cases():
                    budgets = [
                        name
                        for name in plan.fractions
                        if any(is_left(m, case, name) for m in modes)
                    ]
                    if budgets:
                        timed = _rows_of_case(
                            *(shape_name, case, budgets, stock, budgeted, plan, fitted)
                        )
                        yield [
                            row
                            for row in timed
                            if row.mode == STOCK or is_left(row.mode, case, row.budget)
                        ]


def serve_together(
    stack: ExitStack, model: Path, modes: Sequence[str], plan: ServerPlan, log_folder: Path
) -> tuple[Server, list[Budgeted]]:
    """Start stock and one server per mode, and wait for all of them."""

    def start(table: Path | None, mode: str | None) -> Server:
        fused = {ROUTING_VARIABLE: "fused"} if mode is not None and mode.endswith(FUSED) else {}
        server: Server = stack.enter_context(
            started_server(
                model,
                log_path=log_folder / f"{model.name}-{mode or 'stock'}.log",
                table=table,
                mode=None if mode is None else mode.removesuffix(FUSED),
                extra_args=plan.server_arguments(),
                env={**plan.environment, **fused},
            )
        )
        return server

    stock = start(None, None)
    budgeted = []
    for mode in modes:
        path = model.parent / f"{mode}.tbl"
        plain = mode.removesuffix(FUSED)
        tables = threshold_tables(model) if plain == "threshold" else even_tables(model)
        publish_shared_table(path, tables, mode_note=plain)
        server = start(path, mode)
        budgeted.append(
            Budgeted(mode, server, stack.enter_context(closing(SharedTable.open(path))))
        )
    servers = [stock, *(one.server for one in budgeted)]

    def require_all_alive(_waited: str) -> None:
        for one in servers:
            one.process.require_alive()

    for one in servers:
        wait_until_ready(one.process, one.health_url, READY_SECONDS, require_all_alive)
    return stock, budgeted


def _rows_of_case(
    shape_name: str,
    case: Case,
    budgets: Sequence[str],
    stock: Server,
    budgeted: Sequence[Budgeted],
    plan: ServerPlan,
    fitted: dict[tuple[str, str], int],
) -> Iterator[Row]:
    """Yield the rows of a case: stock, then these budgets of every mode.

    fitted: the budgets of mode `threshold` whose thresholds keep what was asked for, which grows.
    """
    stock_times: list[float] = []
    rows = []
    servers = [one.server for one in budgeted]
    for budget in budgets:
        before = {}
        for mode, server, table in budgeted:
            activations = round(plan.fractions[budget] * table.shape.budget_max)
            activations = max(activations, table.shape.budget_min)
            if mode.removesuffix(FUSED) == "threshold" and budget != "full":
                if (mode, budget) not in fitted:
                    fitted[mode, budget] = fit_thresholds(server, table, activations)
                activations = fitted[mode, budget]
            # Each budget anew: an override ends by itself after some minutes.
            BudgetOverride(table).set(activations, activations)
        settle(servers, case)  # so that no step of the last budget is counted here
        for mode, _, table in budgeted:
            before[mode] = table.worker_counters()[0]
        times = _timed_in_turn(case, stock, budgeted, plan)
        stock_times += times.stock
        settle(servers, case)
        for mode, server, table in budgeted:
            used = used_since(before[mode], table.worker_counters()[0], case, table)
            if plan.profiles(case):
                _profile(plan, server, table, case, (shape_name, mode, budget))
            names = (shape_name, case, mode, budget, "plugin")
            rows.append(_row(*names, times.modes[mode], times.stock, used))
    if plan.profiles(case):
        _profile(plan, stock, budgeted[0].table, case, (shape_name, STOCK, "full"))
    beside = "stock beside " + ", ".join(one.mode for one in budgeted)
    yield _row(shape_name, case, STOCK, "full", beside, stock_times, stock_times, None)
    yield from rows


def _timed_in_turn(
    case: Case, stock: Server, budgeted: Sequence[Budgeted], plan: ServerPlan
) -> Times:
    """Time the case on each server in turn, once per repeat, after a turn that is not counted."""
    times = Times([], {mode: [] for mode, _, _ in budgeted})
    for repeat in range(-1, plan.repeats):
        for mode, server in ((None, stock), *((mode, server) for mode, server, _ in budgeted)):
            seconds = _timed(server, case, plan, random.Random(1000 * case.size + repeat))
            if repeat >= 0:
                (times.stock if mode is None else times.modes[mode]).append(seconds)
    return times


def _profile(
    plan: ServerPlan, server: Server, table: SharedTable, case: Case, names: tuple[str, str, str]
) -> None:
    """Add where a decode step's time goes."""
    assert plan.profile is not None  # as `profiles` says
    shape, mode, budget = names
    with client_of(server) as client:

        def decode(tokens: int) -> float:
            return generate(client, case.size, PROMPT_TOKENS, tokens, random.Random(0))

        traces = plan.profile.path.parent / f"traces-{mode}"
        profile = profile_step(client, table.shape.num_layers, decode, traces)
    plan.profile.append((shape, case.size, mode, budget), profile)


class Used(NamedTuple):
    """What the worker measured over a case: means per token, and per layer and step."""

    activations_per_token: float | None
    distinct_experts: float | None


def used_since(before: Any, after: Any, case: Case, table: SharedTable) -> Used:
    def added(name: str) -> int:
        return int(getattr(after, name) - getattr(before, name))

    tokens = added(f"sampled_{case.kind}_tokens")
    steps = added("sampled_decode_steps") * table.shape.num_layers
    activations = added(f"sampled_{case.kind}_activations")
    distinct = added("distinct_experts")
    return Used(
        activations / tokens / table.shape.num_layers if tokens else None,
        distinct / steps if steps and case.kind == "decode" else None,
    )


def fit_thresholds(server: Server, table: SharedTable, activations: int) -> int:
    """Return the budget whose thresholds really keep so many activations.

    Calibration does this for a trained model. A row that affords one activation more keeps about
    one more, whatever the routing, so a few corrections do.
    """
    case, shape = Case("decode", FIT_REQUESTS), table.shape
    tried: dict[int, float] = {}  # by budget, how far from what it should keep
    budget = activations
    while budget not in tried and len(tried) < FIT_STEPS:
        BudgetOverride(table).set(budget, budget)
        before = table.worker_counters()[0]
        with client_of(server) as client:
            generate(client, FIT_REQUESTS, PROMPT_TOKENS, FIT_TOKENS, random.Random(budget))
        settle([server], case)
        used = used_since(before, table.worker_counters()[0], case, table)
        kept = (used.activations_per_token or 0.0) * shape.num_layers
        tried[budget] = abs(kept - activations)
        budget += round(activations - kept)
        budget = min(max(budget, shape.budget_min), shape.budget_max - 1)
    return min(tried, key=lambda one: tried[one])


def settle(servers: Sequence[Server], case: Case) -> None:
    """Let the workers report: they do so twice a second, with what they had fetched before."""
    for _ in range(3):
        time.sleep(0.6)
        for server in servers:
            with client_of(server) as client:
                generate(client, 1, 4, 2 if case.kind == "decode" else 1, random.Random(0))


def _timed(server: Server, case: Case, plan: ServerPlan, generator: random.Random) -> float:
    """Return the seconds of a decode step, or of a prefill."""
    with client_of(server) as client:
        if case.kind == "prefill":
            return generate(client, 1, case.size, 1, generator)
        short = generate(client, case.size, PROMPT_TOKENS, 1, generator)
        long = generate(client, case.size, PROMPT_TOKENS, 1 + plan.decode_steps, generator)
        return (long - short) / plan.decode_steps


def _row(
    shape: str,
    case: Case,
    mode: str,
    budget: str,
    variant: str,
    times: Sequence[float],
    stock: Sequence[float],
    used: Used | None,
) -> Row:
    middle, stock_middle = statistics.median(times), statistics.median(stock)
    return Row(
        *(f"server {case.kind}", shape, case.size, mode, budget, variant),
        median_us=1e6 * middle,
        low_us=1e6 * min(times),
        high_us=1e6 * max(times),
        stock_us=1e6 * stock_middle,
        speedup=stock_middle / middle,
        activations_per_token=None if used is None else used.activations_per_token,
        distinct_experts=None if used is None else used.distinct_experts,
    )
