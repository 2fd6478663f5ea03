"""Demo: the order of its steps, from the start of the server to what the report is made of."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sglang_alloc.allocation_mode import PHASES
from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.demo.comparison import compare
from sglang_alloc.demo.controller_process import controller, controller_settings
from sglang_alloc.demo.load_plan import (
    AFTER_SECONDS,
    BURST_SECONDS,
    CALM_SECONDS,
    LoadPlan,
    bucket_arguments,
)
from sglang_alloc.demo.observation import RunRecord
from sglang_alloc.demo.report import DemoResult
from sglang_alloc.demo.stages import (
    CLIENTS,
    SHAPE,
    WINDOW_SCORED_BYTES,
    WINDOWS,
    Session,
    calibrate,
    full_budget_held,
    measure_losses,
    run_trace,
)
from sglang_alloc.demo.trace import Trace, make_trace
from sglang_alloc.predicted_loss import predicted_loss
from sglang_alloc.server_runs.progress import Stage, StageProgress
from sglang_alloc.server_runs.served_steps import record_of_leading_rank
from sglang_alloc.server_runs.server_process import Server, free_port, serve
from sglang_alloc.shared_table import SharedTable, publish_shared_table
from sglang_alloc.worker_settings import STEP_RECORD_VARIABLE

# The controller may give up as much quality as the tables predict for a third of the activations.
FLOOR_RATIO = 1 / 3
# float32 is several times faster than bfloat16 on CPUs without matrix extensions; chunks of 2048
# tokens bound how long a prefill may hold up the decoding requests. SGLang prefills as long as a
# request may start, so without a limit on the running ones an overload stops all decoding.
SERVER_ARGUMENTS = (
    *("--dtype", "float32"),
    *("--chunked-prefill-size", "2048"),
    *("--max-running-requests", str(CLIENTS)),
)

START, CALIBRATE = "starting SGLang", "measuring the capacity"
BEFORE, CONTROLLED = "run at full budget", "run under the controller"
AFTER = "run at full budget again"
LOSS, WRITE = "held-out loss", "writing the report"
# The folder in `out` with one line per engine step, and the budgets that it obeyed.
_STEPS = "steps"
_TRACE_SECONDS = CALM_SECONDS + BURST_SECONDS + AFTER_SECONDS
STAGES = (
    Stage(START, 40.0),
    Stage(CALIBRATE, 53.0),
    Stage(BEFORE, _TRACE_SECONDS + 5.0),
    Stage(CONTROLLED, _TRACE_SECONDS + 8.0),
    Stage(AFTER, _TRACE_SECONDS + 5.0),
    Stage(LOSS, 55.0),
    Stage(WRITE, 5.0),
)


@dataclass(frozen=True)
class DemoOptions:
    """What to serve, with which tables, and where to leave the results."""

    model: Path
    tables: Path
    texts: tuple[str, ...]
    out: Path
    mode: str
    seed: int


def run_demo(options: DemoOptions, progress: StageProgress) -> DemoResult:
    """Serve the trace three times, measure the losses, stop everything, return what was observed.

    Raises an AllocError with a sentence for the terminal when a step cannot be done.
    """
    with contextlib.ExitStack() as stack:
        table_path = stack.enter_context(_published(options))
        with progress.stage(START):
            server = stack.enter_context(_serve(options, table_path, progress))
        table = stack.enter_context(contextlib.closing(SharedTable.open(table_path)))
        record = record_of_leading_rank(options.out / _STEPS)
        session = Session(server, table, record, options.texts, options.seed, progress.note)
        return _measure(session, options, progress)


def _measure(session: Session, options: DemoOptions, progress: StageProgress) -> DemoResult:
    shape = session.table.shape
    floor_budget = max(shape.budget_min, round(FLOOR_RATIO * shape.budget_max))
    max_loss = _loss_allowed(session.table, floor_budget)
    with progress.stage(CALIBRATE):
        plan = calibrate(session, floor_budget)

    def full(stage: str, keep: str, plan: LoadPlan) -> RunRecord:
        with progress.stage(stage), full_budget_held(session):
            return run_trace(session, _trace(session, plan), options.out / keep)

    def controlled(plan: LoadPlan) -> RunRecord:
        with (
            progress.stage(CONTROLLED),
            _controller(options, session, plan, floor_budget, max_loss),
        ):
            return run_trace(session, _trace(session, plan), options.out / "controlled.jsonl")

    runs = compare(
        plan,
        partial(full, BEFORE, "full-before.jsonl"),
        controlled,
        partial(full, AFTER, "full-after.jsonl"),
    )
    with progress.stage(LOSS):
        full_loss, level_losses = measure_losses(session, runs.controlled)
    return DemoResult(
        model=options.model.name,
        mode=options.mode,
        shape=SHAPE,
        runs=runs,
        full_budget=session.full_budget,
        floor_budget=floor_budget,
        max_predicted_loss=max_loss,
        full_loss=full_loss,
        level_losses=tuple(level_losses),
        scored_tokens=WINDOWS * WINDOW_SCORED_BYTES,
    )


def _loss_allowed(table: SharedTable, floor_budget: int) -> float:
    """Return the largest loss, nats per token, predicted for `floor_budget` or any above it."""
    first = floor_budget - table.shape.budget_min
    return max(float(predicted_loss(table, phase)[first:].max()) for phase in PHASES)


def _trace(session: Session, plan: LoadPlan) -> Trace:
    return make_trace(session.texts, plan.phases, **SHAPE._asdict(), seed=session.seed)


@contextlib.contextmanager
def _published(options: DemoOptions) -> Iterator[Path]:
    """Publish the tables for this demo alone, in memory where the machine has /dev/shm."""
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() else Path(tempfile.gettempdir())
    path = folder / "sglang-alloc" / f"demo-{os.getpid()}.tbl"
    publish_shared_table(path, load_budget_tables(options.tables), mode_note=options.mode)
    try:
        yield path
    finally:
        for leftover in path.parent.glob(f"{path.name}*"):
            leftover.unlink(missing_ok=True)


def _serve(
    options: DemoOptions, table_path: Path, progress: StageProgress
) -> contextlib.AbstractContextManager[Server]:
    return serve(
        options.model,
        table=table_path,
        mode=options.mode,
        extra_args=[*SERVER_ARGUMENTS, *bucket_arguments()],
        # All runs are on this server, so what writing the record costs is in each of them.
        env={STEP_RECORD_VARIABLE: str(options.out / _STEPS)},
        log_path=options.out / "server.log",
        on_wait=progress.note,
    )


def _controller(
    options: DemoOptions, session: Session, plan: LoadPlan, floor_budget: int, max_loss: float
) -> contextlib.AbstractContextManager[object]:
    decisions = options.out / "decisions.jsonl"
    decisions.unlink(missing_ok=True)
    settings = controller_settings(
        table=session.table.path,
        server_url=session.server.url,
        slo=plan.slo,
        floor_budget=floor_budget,
        max_predicted_loss=max_loss,
        decision_log=decisions,
        port=free_port(),
    )
    return controller(
        settings,
        config_path=options.out / "controller.yaml",
        log_path=options.out / "controller.log",
    )
