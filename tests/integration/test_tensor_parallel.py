"""Two tensor-parallel ranks put every change of budget in force before the same batch."""

from __future__ import annotations

import csv
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from generation import generate

from sglang_alloc.server_runs.server_process import serve
from sglang_alloc.shared_table import SelectorWriter, SharedTable
from sglang_alloc.worker_settings import STEP_RECORD_VARIABLE

pytestmark = pytest.mark.server

TWO_RANKS = ("--dtype", "float32", "--tp-size", "2", "--skip-server-warmup")
REQUESTS, PARALLEL, NEW_TOKENS = 24, 6, 100
WANTED_SWITCHES = 200


def _switch_until(stop: threading.Event, table_path: Path) -> None:
    """Move both budgets about every 10 ms, never twice to the same place."""
    table = SharedTable.open(table_path)
    writer = SelectorWriter.acquire(table)
    lowest, span = table.shape.budget_min, table.shape.budget_max - table.shape.budget_min + 1
    step = 0
    while not stop.wait(0.01):
        step += 1
        writer.beat(time.monotonic_ns())
        writer.write(lowest + step % span, lowest + (step * 5) % span)
    writer.close()
    table.close()


def _read_record(folder: Path, rank: int) -> list[dict[str, str]]:
    with (folder / f"rank{rank}.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["begun_ns"]  # each rank has its own
    return rows


def test_both_ranks_record_the_same_generation_at_every_step(
    tiny_model: Callable[[str], Path], tiny_table: Callable[[Path], Path], tmp_path: Path
) -> None:
    model, record = tiny_model("qwen3_moe"), tmp_path / "steps"
    table = tiny_table(model)
    environment = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", STEP_RECORD_VARIABLE: str(record)}
    log = tmp_path / "server.log"
    with serve(model, table=table, env=environment, log_path=log, extra_args=TWO_RANKS) as server:
        stop = threading.Event()
        switcher = threading.Thread(target=_switch_until, args=(stop, table))
        switcher.start()
        with ThreadPoolExecutor(PARALLEL) as pool:
            prompts = [[(3 * i + r) % 256 for i in range(20 + r)] for r in range(REQUESTS)]
            answers = list(pool.map(lambda p: generate(server.url, p, NEW_TOKENS), prompts))
        stop.set()
        switcher.join()
    assert [len(answer.tokens) for answer in answers] == [NEW_TOKENS] * REQUESTS
    first, second = _read_record(record, 0), _read_record(record, 1)
    assert first[: len(second)] == second[: len(first)]
    assert abs(len(first) - len(second)) <= 1, "the server was stopped between two records"
    switches = len({row["generation"] for row in first if row["source"] == "controller"})
    assert switches >= WANTED_SWITCHES
