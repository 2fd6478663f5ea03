"""Data story, cost of its first step: nanoseconds per read and write of the shared table.

Run: python -m sglang_alloc.bench.shared_table
"""

import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.shared_table import (
    Fallback,
    SelectorWriter,
    SharedTable,
    WorkerCounters,
    publish_shared_table,
)
from sglang_alloc.solve import solve_all_budgets

# Qwen3-30B-A3B's shape.
NUM_LAYERS, TOP_K, NUM_EXPERTS = 48, 8, 128
# A thousand calls fit into one time slice, so the best repeat was not interrupted.
_REPEATS, _CALLS = 500, 1_000
_STALE_AFTER_NS = 10_000_000_000


def main() -> None:
    """Print the best of many repeats of each operation."""
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
        path = Path(folder) / "bench.tbl"
        publish_shared_table(path, _make_tables())
        table = SharedTable.open(path)
        writer = SelectorWriter.acquire(table)
        for name, operation in _operations(table, writer).items():
            print(f"{name:<44}{_nanoseconds(operation):>8.0f} ns")
        print(f"{'SharedTable.open, checks included':<44}{_opening_microseconds(path):>8.0f} us")
        writer.close()
        table.close()


def _operations(table: SharedTable, writer: SelectorWriter) -> dict[str, Callable[[], object]]:
    now_ns = time.monotonic_ns()
    writer.beat(now_ns)
    full = Fallback("full")
    slot = table.worker_slot(0)
    counters = WorkerCounters(pid=1, steps=1)
    return {
        "an empty call": lambda: None,
        "selector_word()": table.selector_word,
        "selector()": table.selector,
        "selection(), controller alive": lambda: table.selection(now_ns, _STALE_AFTER_NS, full),
        "selection(), controller stale": lambda: table.selection(2 * now_ns, 1, full),
        "worker_slot.store(), all 16 words": lambda: slot.store(counters),
        "writer.write()": lambda: writer.write(100, 200),
        "writer.beat()": lambda: writer.beat(now_ns),
    }


def _nanoseconds(operation: Callable[[], object]) -> float:
    return min(timeit.repeat(operation, number=_CALLS, repeat=_REPEATS)) / _CALLS * 1e9


def _opening_microseconds(path: Path) -> float:
    def open_and_close() -> None:
        SharedTable.open(path).close()

    return min(timeit.repeat(open_and_close, number=1, repeat=_REPEATS)) * 1e6


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _make_tables() -> BudgetTables:
    rising = np.random.default_rng(0).random((NUM_LAYERS, TOP_K)).cumsum(axis=1)
    solution = solve_all_budgets(rising[:, ::-1])
    return BudgetTables(
        model_id="bench",
        fingerprint="0" * 64,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        layer_ids=np.arange(NUM_LAYERS, dtype=np.int32),
        budgets=solution.budgets,
        quotas=solution.quotas,
        predicted_loss=solution.predicted_loss,
    )


if __name__ == "__main__":
    main()
