"""What the shared table says about a running server, as plain numbers for people and scripts."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_alloc.errors import SharedTableError
from sglang_alloc.shared_table import (
    SOURCES,
    CalmTokens,
    SharedTable,
    WorkerCounters,
)
from sglang_alloc.shared_table_liveness import is_alive, process_lives


@dataclass(frozen=True)
class WorkerStatus:
    """One rank: the budgets it has taken over and what it measured.

    The means are over the sampled tokens and steps since the counters it was compared with, None
    where there were none: activations per token over all MoE layers, distinct experts per layer
    and decode step. The calm ratios are the shares that calm steps have of all tokens since the
    server started. A rank counts as alive when its pid is, or when it has stepped
    within ten seconds: from another container its pid cannot be seen.
    """

    rank: int
    pid: int
    alive: bool
    acknowledged_generation: int
    source: str
    prefill_budget: int
    decode_budget: int
    prefill_activations_per_token: float | None
    decode_activations_per_token: float | None
    calm_prefill_ratio: float | None
    calm_decode_ratio: float | None
    distinct_experts_per_layer: float | None
    kept_mass_ratio: float
    steps: int
    fallbacks: int
    last_step_age_seconds: float


@dataclass(frozen=True)
class OverrideStatus:
    """The override in force."""

    prefill_budget: int
    decode_budget: int
    actor: str
    seconds_left: float


@dataclass(frozen=True)
class TableStatus:
    """One look at a shared table; budgets in activations per token over all MoE layers.

    The calm ones are those of steps that leave no request waiting while fewer than
    `calm_running_requests` run; None where all steps have the same.
    """

    path: str
    model_id: str
    publication_id: str
    num_layers: int
    top_k: int
    num_experts: int
    budget_min: int
    budget_max: int
    generation: int
    prefill_budget: int
    decode_budget: int
    calm_prefill_budget: int | None
    calm_decode_budget: int | None
    calm_running_requests: int | None
    writer_pid: int
    writer_epoch: int
    heartbeat_age_seconds: float | None
    override: OverrideStatus | None
    workers: tuple[WorkerStatus, ...]


def table_status(
    table: SharedTable, now_ns: int, earlier: Mapping[int, WorkerCounters] | None = None
) -> TableStatus:
    """Look at `table` at `now_ns` (monotonic); means are since `earlier`, by rank, if given."""
    selector = table.selector()
    heartbeat_ns = table.heartbeat_ns()
    shape = table.shape
    calm, tokens = table.calm_budgets(), table.calm_tokens()
    return TableStatus(
        path=str(table.path),
        model_id=table.model_id,
        publication_id=table.publication_id,
        num_layers=shape.num_layers,
        top_k=shape.top_k,
        num_experts=shape.num_experts,
        budget_min=shape.budget_min,
        budget_max=shape.budget_max,
        generation=selector.generation,
        prefill_budget=selector.prefill_budget,
        decode_budget=selector.decode_budget,
        calm_prefill_budget=None if calm is None else calm.prefill_budget,
        calm_decode_budget=None if calm is None else calm.decode_budget,
        calm_running_requests=None if calm is None else calm.running_requests,
        writer_pid=table.writer_pid(),
        writer_epoch=table.writer_epoch(),
        heartbeat_age_seconds=(now_ns - heartbeat_ns) / 1e9 if heartbeat_ns else None,
        override=_override_status(table, now_ns),
        workers=tuple(
            _worker_status(
                counters,
                (earlier or {}).get(counters.rank),
                tokens[counters.rank],
                shape.num_layers,
                now_ns,
            )
            for counters in table.worker_counters()
        ),
    )


def living_workers(path: Path) -> list[int]:
    """Return the pids that hold a slot of the table at `path` and live, as seen from here."""
    with (
        contextlib.suppress(SharedTableError),
        SharedTable.open(path, writable=False) as table,
    ):
        return [worker.pid for worker in table.worker_counters() if process_lives(worker.pid)]
    return []


def _override_status(table: SharedTable, now_ns: int) -> OverrideStatus | None:
    override = table.override(now_ns)
    if override is None:
        return None
    seconds_left = (override.deadline_ns - now_ns) / 1e9
    return OverrideStatus(
        override.prefill_budget, override.decode_budget, override.actor, seconds_left
    )


def _worker_status(
    counters: WorkerCounters,
    earlier: WorkerCounters | None,
    tokens: CalmTokens,
    num_layers: int,
    now_ns: int,
) -> WorkerStatus:
    # Another pid is another run of the server, whose counters began at zero again.
    before = earlier if earlier and earlier.pid == counters.pid else WorkerCounters()

    def mean(total: str, count: str) -> float | None:
        samples = getattr(counters, count) - getattr(before, count)
        return (getattr(counters, total) - getattr(before, total)) / samples if samples else None

    distinct = mean("distinct_experts", "sampled_decode_steps")
    source = counters.acknowledged_source
    return WorkerStatus(
        rank=counters.rank,
        pid=counters.pid,
        alive=is_alive(counters, now_ns),
        acknowledged_generation=counters.acknowledged_generation,
        source=SOURCES[source] if source < len(SOURCES) else f"unknown {source}",
        prefill_budget=counters.prefill_budget,
        decode_budget=counters.decode_budget,
        prefill_activations_per_token=mean("sampled_prefill_activations", "sampled_prefill_tokens"),
        decode_activations_per_token=mean("sampled_decode_activations", "sampled_decode_tokens"),
        calm_prefill_ratio=tokens.calm_prefill / tokens.prefill if tokens.prefill else None,
        calm_decode_ratio=tokens.calm_decode / tokens.decode if tokens.decode else None,
        distinct_experts_per_layer=None if distinct is None else distinct / num_layers,
        kept_mass_ratio=counters.kept_mass_millionths / 1e6,
        steps=counters.steps,
        fallbacks=counters.fallbacks,
        last_step_age_seconds=(now_ns - counters.last_step_ns) / 1e9,
    )
