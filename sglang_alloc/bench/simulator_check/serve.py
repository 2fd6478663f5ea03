"""Simulator check, first two steps: a real server is benched, then serves the trace four times.

At full budget, at a reduced fixed one, and under the real controller: by latencies alone with the
demo's short times, and looking ahead by the bench with the constants that production has. The
trace's rates are shares of what the server carries at full budget, measured just before, up to
beyond it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from sglang_alloc import allocation_mode
from sglang_alloc.allocation_mode import Phase
from sglang_alloc.bench.simulator_check.felt import (
    AHEAD,
    BY_LATENCIES,
    BudgetsFrom,
    Computed,
    Felt,
    Request,
    Run,
    Served,
)
from sglang_alloc.bench.simulator_check.fit import StepBench, write_bench
from sglang_alloc.bench.simulator_check.service import fitted_times, write_times
from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.demo.calibration import ClosedLoop, RequestShape, measure_closed_loop
from sglang_alloc.demo.controller_process import controller, controller_settings
from sglang_alloc.demo.load_plan import (
    ITL_EDGES_SECONDS,
    ITL_SLACK_RATIO,
    TTFT_EDGES_SECONDS,
    TTFT_SLACK_RATIO,
    Slo,
    bucket_arguments,
    next_edge,
)
from sglang_alloc.demo.observation import RunRecord
from sglang_alloc.demo.served import budget_timeline, mean_budget, summarise_steps
from sglang_alloc.demo.stages import Session, run_trace
from sglang_alloc.demo.trace import LoadPhase, Trace, make_trace
from sglang_alloc.server_runs.budget_override import BudgetOverride, flush_cache
from sglang_alloc.server_runs.progress import Stage, StageProgress
from sglang_alloc.server_runs.served_steps import read_steps, record_of_leading_rank
from sglang_alloc.server_runs.server_process import Server, free_port, serve
from sglang_alloc.shared_table import SharedTable, publish_shared_table
from sglang_alloc.worker_settings import STEP_RECORD_VARIABLE

CLIENTS, CHUNK_TOKENS = 8, 2048
SERVER_ARGUMENTS = (
    *("--dtype", "float32"),
    *("--chunked-prefill-size", str(CHUNK_TOKENS)),
    *("--max-running-requests", str(CLIENTS)),
)
FLOOR_RATIO = 1 / 3
BENCH_ROUNDS = 3
# (name, seconds, share of the capacity at full budget)
PHASES = (("calm", 20.0, 0.5), ("busy", 20.0, 0.8), ("over", 25.0, 1.15), ("after", 15.0, 0.5))
TRACE_SECONDS = sum(seconds for _, seconds, _ in PHASES)
BENCH_FILE = "bench.csv"
START, BENCH, CAPACITY = "starting SGLang", "timing steps", "measuring the capacity"
FULL, REDUCED = "full", "reduced"
STAGES = (
    Stage(START, 40.0),
    Stage(BENCH, 75.0),
    Stage(CAPACITY, 13.0),
    *(Stage(name, TRACE_SECONDS + 5.0) for name in (FULL, REDUCED, BY_LATENCIES, AHEAD)),
)


@dataclass(frozen=True)
class Options:
    """What to serve, with which tables, requests of which size, and where to leave the results."""

    model: Path
    tables: Path
    texts: tuple[str, ...]
    mode: str
    seed: int
    out: Path
    shape: RequestShape


def measure(options: Options, facts: dict[str, object], progress: StageProgress) -> Served:
    """Bench the server, serve the trace four times, write bench.csv, return what was felt.

    Raises an AllocError with a sentence for the terminal when a step cannot be done.
    """
    with _session(options, progress) as session:
        budgets = _budgets(session.table)
        with progress.stage(BENCH):
            _bench(session, options, budgets, facts)
        with progress.stage(CAPACITY):
            capacity = _capacity(session, options)
        phases = [
            LoadPhase(name, seconds, share * capacity.requests_per_second)
            for name, seconds, share in PHASES
        ]
        trace = make_trace(session.texts, phases, **options.shape._asdict(), seed=options.seed)
        settings = {
            name: _settings(session, capacity, budgets[-1], options.out, name)
            for name in (BY_LATENCIES, AHEAD)
        }
        records, begun_seconds = {}, time.monotonic()
        for name, budget in ((FULL, budgets[0]), (REDUCED, budgets[-1])):
            with progress.stage(name):
                records[name] = _at_fixed(session, trace, options.out / f"{name}.jsonl", budget)
        for name, of_run in settings.items():
            with progress.stage(name):
                records[name] = _controlled(session, trace, of_run, options.out, name)
    steps = read_steps(session.step_record)
    in_service = [step for step in steps if step.begun_seconds >= begun_seconds]
    write_times(options.out / "service.csv", fitted_times(in_service, (budgets[-1], budgets[0])))
    return Served(
        facts={**facts, "capacity_requests_per_second": round(capacity.requests_per_second, 3)},
        requests=_requests(trace, records[FULL]),
        phases=tuple(trace.phase_bounds()),
        # Without the paths of this machine.
        settings={name: _without_paths(of_run) for name, of_run in settings.items()},
        max_running_requests=CLIENTS,
        chunk_tokens=CHUNK_TOKENS,
        runs=tuple(run_of(name, record) for name, record in records.items()),
    )


@contextlib.contextmanager
def _session(options: Options, progress: StageProgress) -> Iterator[Session]:
    table_path, steps = options.out / "check.tbl", options.out / "steps"
    publish_shared_table(table_path, load_budget_tables(options.tables))
    with contextlib.ExitStack() as stack:
        with progress.stage(START):
            server: Server = stack.enter_context(
                serve(
                    options.model,
                    table=table_path,
                    mode=options.mode,
                    extra_args=[*SERVER_ARGUMENTS, *bucket_arguments()],
                    env={STEP_RECORD_VARIABLE: str(steps)},
                    log_path=options.out / "server.log",
                    on_wait=progress.note,
                )
            )
        table = stack.enter_context(contextlib.closing(SharedTable.open(table_path)))
        record = record_of_leading_rank(steps)
        yield Session(server, table, record, options.texts, options.seed, progress.note)


def _budgets(table: SharedTable) -> list[int]:
    """Return the budgets to time, from full to the floor; they fall by about a third each."""
    shape = table.shape
    floor = max(shape.budget_min, round(FLOOR_RATIO * shape.budget_max))
    middle = round((floor + shape.budget_max) / 2)
    return [shape.budget_max, shape.budget_max - 1, middle, floor]


def _bench(
    session: Session, options: Options, budgets: list[int], facts: dict[str, object]
) -> None:
    override = BudgetOverride(session.table)
    with httpx2.Client(base_url=session.server.url, timeout=60.0, trust_env=False) as client:
        bench = StepBench(client, override, session.texts, options.shape.prompt_bytes)
        for number in range(BENCH_ROUNDS):
            session.note(f"round {number + 1} of {BENCH_ROUNDS}")
            flush_cache(client)
            bench.run_round(budgets, seed=1000 * options.seed + number)
    override.clear()
    write_bench(options.out / BENCH_FILE, bench.seconds, options.shape.prompt_bytes, facts)


def _capacity(session: Session, options: Options) -> ClosedLoop:
    """Return what eight clients get at full budget; prompts differ from the bench's."""
    override = BudgetOverride(session.table)
    override.set(session.full_budget, session.full_budget)
    found = measure_closed_loop(
        session.server.url,
        session.texts,
        options.shape,
        clients=CLIENTS,
        seconds=10.0,
        seed=options.seed + 1,
        on_tick=session.server.process.require_alive,
    )
    override.clear()
    return found


def _at_fixed(session: Session, trace: Trace, keep: Path, budget: int) -> RunRecord:
    override = BudgetOverride(session.table)
    override.set(budget, budget)
    record = run_trace(session, trace, keep)
    override.clear()
    return record


def _controlled(
    session: Session, trace: Trace, settings: dict[str, Any], out: Path, name: str
) -> RunRecord:
    stem = _stem(name)
    config, log = out / f"{stem}.yaml", out / f"{stem}.log"
    with controller(settings, config_path=config, log_path=log):
        return run_trace(session, trace, out / f"{stem}.jsonl")


def _settings(
    session: Session, capacity: ClosedLoop, floor_budget: int, out: Path, name: str
) -> dict[str, Any]:
    """Return the demo's settings, with SLOs of the same rule.

    The law that looks ahead is told the bench and keeps the constants that production has.
    """
    slo = Slo(
        next_edge(TTFT_SLACK_RATIO * capacity.median_ttft_seconds, TTFT_EDGES_SECONDS),
        next_edge(ITL_SLACK_RATIO * capacity.mean_itl_seconds, ITL_EDGES_SECONDS),
    )
    settings = controller_settings(
        table=session.table.path,
        server_url=session.server.url,
        slo=slo,
        floor_budget=floor_budget,
        decision_log=out / f"decisions-{_stem(name)}.jsonl",
        port=free_port(),
    )
    if name == AHEAD:
        settings["law"] = {}
        settings["quality"]["cost_model"] = str(out / BENCH_FILE)
    return settings


def _stem(name: str) -> str:
    return name.replace(" ", "-")


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without the paths of this machine, which other ones do not have."""
    quality = dict(settings["quality"])
    if "cost_model" in quality:
        quality["cost_model"] = BENCH_FILE
    return {**settings, "table": "", "decision_log": {}, "quality": quality}


def run_of(name: str, record: RunRecord) -> Run:
    """Return what was felt; an unanswered request's figures are NaN."""
    felt = tuple(
        Felt(
            math.nan if one.ttft_seconds is None else one.ttft_seconds,
            math.nan if one.mean_itl_seconds is None else one.mean_itl_seconds,
        )
        for one in record.requests
    )
    return Run(
        name,
        felt,
        tuple((sample.second, sample.queue_requests) for sample in record.gauges),
        tuple(_budgets_from(record)),
        *(_computed(record, phase) for phase in allocation_mode.PHASES),
    )


def _budgets_from(record: RunRecord) -> Iterator[BudgetsFrom]:
    """Yield the budgets of both kinds of steps at each change of any of them."""
    lines = [
        {one.second: (one.busy, one.calm) for one in budget_timeline(record, phase, record.seconds)}
        for phase in allocation_mode.PHASES
    ]
    (prefill, prefill_calm), (decode, decode_calm) = (next(iter(line.values())) for line in lines)
    for second in sorted({second for line in lines for second in line}):
        prefill, prefill_calm = lines[0].get(second, (prefill, prefill_calm))
        decode, decode_calm = lines[1].get(second, (decode, decode_calm))
        yield BudgetsFrom(second, prefill, decode, prefill_calm, decode_calm)


def _computed(record: RunRecord, phase: Phase) -> Computed:
    steps = [step for step in record.steps if step.phase == phase]
    return Computed(mean_budget(steps), summarise_steps(steps)["calm_tokens_ratio"][phase])


def _requests(trace: Trace, record: RunRecord) -> tuple[Request, ...]:
    return tuple(
        Request(traced.phase, round(traced.due_second, 5), one.prompt_tokens, traced.output_tokens)
        for traced, one in zip(trace.requests, record.requests, strict=True)
    )
