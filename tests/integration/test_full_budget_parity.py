"""At full budget the served tokens and logprobs are stock SGLang's, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from generation import PROMPTS, Generated, generate_all

from sglang_alloc.demo.server_process import Server, serve
from sglang_alloc.shared_table import SharedTable

pytestmark = pytest.mark.server

EXTRA = ("--dtype", "float32", "--disable-radix-cache", "--skip-server-warmup")
MINUTE_NS = 60 * 10**9


def _at_budget(server: Server, budget: int) -> list[Generated]:
    """Generate under a manual budget, then give it back."""
    assert server.table is not None
    table = SharedTable.open(server.table)
    table.set_override(budget, budget, time.monotonic_ns() + MINUTE_NS, "test")
    _wait_for(table, budget)
    generated = generate_all(server.url, PROMPTS)
    table.clear_override()
    _wait_for(table, table.shape.budget_max)
    table.close()
    return generated


def _wait_for(table: SharedTable, budget: int) -> None:
    deadline = time.monotonic() + 30.0
    while table.worker_counters()[0].decode_budget != budget:
        assert time.monotonic() < deadline, f"budget {budget} was not acknowledged within 30 s"
        time.sleep(0.05)


@pytest.mark.parametrize("architecture", tiny_models.MOE_ARCHITECTURES)
def test_full_budget_equals_stock_bit_for_bit(
    architecture: str,
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    model = tiny_model(architecture)
    with serve(model, log_path=tmp_path / "stock.log", extra_args=EXTRA) as stock_server:
        stock = generate_all(stock_server.url, PROMPTS)
    table, log = tiny_table(model), tmp_path / "alloc.log"
    with serve(model, table=table, log_path=log, extra_args=EXTRA) as server:
        full = generate_all(server.url, PROMPTS)
        reduced = _at_budget(server, budget=tiny_models.make_tables(model).budget_min)
        restored = generate_all(server.url, PROMPTS)
    assert full == stock
    assert reduced != stock, "the smallest budget changed nothing: it was not enforced"
    assert restored == stock
