"""Demo, steps 2 to 4 against the running server: calibrate, run the trace, measure the losses."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

from sglang_alloc.demo.calibration import (
    ClosedLoop,
    RequestShape,
    faster,
    measure_closed_loop,
)
from sglang_alloc.demo.heldout_loss import (
    Level,
    LevelLoss,
    cut_windows,
    measure_level,
)
from sglang_alloc.demo.levels import quantise
from sglang_alloc.demo.load_plan import LoadPlan, plan_load
from sglang_alloc.demo.observation import RunRecord, observe_run
from sglang_alloc.demo.served import served_budgets
from sglang_alloc.demo.trace import Trace
from sglang_alloc.server_runs.budget_override import BudgetOverride, flush_cache
from sglang_alloc.server_runs.server_process import Server
from sglang_alloc.shared_table import SharedTable

# Long prompts and short answers: on a CPU, prefill is where fewer experts save most. Prompt and
# answer together stay within the 1024 tokens that the reference model was trained on.
SHAPE = RequestShape(prompt_bytes=896, output_tokens=16)
CLIENTS, WARM_UP_SECONDS, IDLE_SECONDS, FULL_BATCH_SECONDS = 8, 4.0, 4.0, 6.0
CAPACITY_TURNS = 2
WINDOWS, WINDOW_PROMPT_BYTES, WINDOW_SCORED_BYTES = 40, 640, 128


@dataclass(frozen=True)
class Session:
    """The running server with its table and text; `note` tells the person at the terminal.

    `step_record` is the leading rank's (`step_record.py`).
    """

    server: Server
    table: SharedTable
    step_record: Path
    texts: tuple[str, ...]
    seed: int
    note: Callable[[str], None]

    @property
    def full_budget(self) -> int:
        return self.table.shape.budget_max


def calibrate(session: Session, floor_budget: int) -> LoadPlan:
    """Measure the capacities by closed loops at full and at floor budget; plan the load.

    Every capacity is measured twice, in turns, and the faster of the two counts: other work on the
    machine can only make a server slower, and a capacity read too low makes too light a load.
    """
    override = BudgetOverride(session.table)

    def measure(budget: int, clients: int, seconds: float) -> ClosedLoop:
        # Each measurement draws the same prompts: what the cache keeps of them would flatter it.
        _flush(session)
        override.set(budget, budget)
        return _closed_loop(session, budget, clients, seconds)

    measure(session.full_budget, CLIENTS, WARM_UP_SECONDS)
    idle = measure(session.full_budget, 1, IDLE_SECONDS)
    budgets = (session.full_budget, session.full_budget - 1, floor_budget)
    turns = [
        [measure(budget, CLIENTS, FULL_BATCH_SECONDS) for budget in budgets]
        for _ in range(CAPACITY_TURNS)
    ]
    override.clear()
    full, one_below, floor = (faster(loops) for loops in zip(*turns, strict=True))
    return plan_load(idle, full, one_below, floor)


@contextlib.contextmanager
def full_budget_held(session: Session) -> Iterator[None]:
    """Hold the full budget for the block, whatever a controller before it left in the table."""
    override = BudgetOverride(session.table)
    override.set(session.full_budget, session.full_budget)
    try:
        yield
    finally:
        override.clear()


def run_trace(session: Session, trace: Trace, keep: Path) -> RunRecord:
    """Run the trace on an empty prefix cache; keep each request's record as a JSON line."""
    _flush(session)

    def on_tick(second: float, sent: int, finished: int) -> None:
        session.server.process.require_alive()
        session.note(
            f"second {second:.0f} of {trace.seconds:.0f}, {sent} of {len(trace.requests)} sent, "
            f"{finished} answered"
        )

    run = observe_run(session.server.url, trace, session.table, session.step_record, on_tick)
    lines = [json.dumps(request._asdict()) for request in run.requests]
    keep.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run


def measure_losses(session: Session, controlled: RunRecord) -> tuple[LevelLoss, list[LevelLoss]]:
    """Return the loss at full budget, and at each level that the controlled run was served at."""
    full_budget = session.full_budget
    windows = cut_windows(
        session.texts, WINDOWS, WINDOW_PROMPT_BYTES, WINDOW_SCORED_BYTES, session.seed
    )
    override = BudgetOverride(session.table)

    def measure(level: Level) -> LevelLoss:
        def on_tick() -> None:
            session.server.process.require_alive()
            session.note(f"scoring at {level.prefill_budget}/{level.decode_budget}")

        return measure_level(session.server.url, override, windows, level, on_tick)

    full_loss = measure(Level(full_budget, full_budget, 1.0))
    losses = [
        LevelLoss(level, full_loss.window_losses)
        if level[:2] == (full_budget, full_budget)
        else measure(level)
        for level in quantise(served_budgets(controlled), full_budget)
    ]
    override.clear()
    return full_loss, losses


def _flush(session: Session) -> None:
    with httpx2.Client(base_url=session.server.url, timeout=30.0, trust_env=False) as client:
        flush_cache(client)


def _closed_loop(session: Session, budget: int, clients: int, seconds: float) -> ClosedLoop:
    def on_tick() -> None:
        session.server.process.require_alive()
        session.note(f"{clients} clients at {budget} activations per token")

    return measure_closed_loop(
        session.server.url,
        session.texts,
        SHAPE,
        clients=clients,
        seconds=seconds,
        seed=session.seed,
        on_tick=on_tick,
    )
