"""At full budget the served tokens and logprobs are stock SGLang's, bit for bit; at less they obey.

The prefix cache is on, as SGLang is served by default, and emptied before each pass: states that a
reduced budget left in it would be used again at full budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from generation import PROMPTS, Generated, generate_all

from sglang_alloc.server_runs.budget_override import BudgetOverride
from sglang_alloc.server_runs.server_process import Server, serve
from sglang_alloc.shared_table import SharedTable, WorkerCounters

pytestmark = pytest.mark.server

EXTRA = ("--dtype", "float32", "--skip-server-warmup")


@dataclass(frozen=True)
class Case:
    """An architecture, the mode it is served in, and the number of tensor-parallel ranks."""

    architecture: str
    mode: str
    ranks: int = 1

    @property
    def arguments(self) -> tuple[str, ...]:
        return EXTRA if self.ranks == 1 else (*EXTRA, "--tp-size", str(self.ranks))

    @property
    def environment(self) -> dict[str, str]:
        cores = "|".join(str(core) for core in range(self.ranks))
        return {} if self.ranks == 1 else {"SGLANG_CPU_OMP_THREADS_BIND": cores}


CASES = [
    Case("qwen3_moe", "threshold"),
    Case("qwen3_moe", "token", ranks=2),
    Case("olmoe", "layer"),
    Case("mixtral", "union"),
    Case("glm4_moe", "layer"),
]


class _Budgeted:
    """A server under budgets that are set by hand."""

    def __init__(self, server: Server, table: SharedTable) -> None:
        self._url, self.table = server.url, table
        self._override = BudgetOverride(table)
        self.full = table.shape.budget_max

    def at(self, prefill: int, decode: int) -> tuple[list[Generated], WorkerCounters]:
        """Generate at these budgets on an empty cache; return what was counted meanwhile too."""
        self._override.set(prefill, decode)
        before = self.table.worker_counters()[0]
        generated = _generate(self._url)
        self._override.set(self.full, self.full)
        after = self.table.worker_counters()[0]
        return generated, WorkerCounters(*(b - a for a, b in zip(before, after, strict=True)))


def _generate(url: str) -> list[Generated]:
    httpx2.post(f"{url}/flush_cache", params={"timeout": 10}, trust_env=False).raise_for_status()
    return generate_all(url, PROMPTS)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.architecture}-{c.mode}-tp{c.ranks}")
def test_full_budget_equals_stock_and_a_reduced_one_is_obeyed(
    case: Case,
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    model = tiny_model(case.architecture)
    options = {"extra_args": case.arguments, "env": case.environment}
    with serve(model, log_path=tmp_path / "stock.log", **options) as server:
        stock = _generate(server.url)
    table_path, log = tiny_table(model), tmp_path / "alloc.log"
    with (
        serve(model, table=table_path, mode=case.mode, log_path=log, **options) as server,
        SharedTable.open(table_path) as table,
    ):
        untouched = _generate(server.url)
        budgeted, least = _Budgeted(server, table), table.shape.budget_min
        decode_only, counted = budgeted.at(budgeted.full, least)
        both, _ = budgeted.at(least, least)
        restored, _ = budgeted.at(budgeted.full, budgeted.full)
    assert untouched == stock
    assert restored == stock
    _assert_only_decode_changed(decode_only, stock)
    assert [g.prompt_logprobs for g in both] != [g.prompt_logprobs for g in stock]
    _assert_obeyed(counted, case.mode, least, budgeted.full)
    assert f"{len(table.layer_ids)} MoE layers" in _start_line(log)
    assert f"mode {case.mode}, rank" in _start_line(log)


def _assert_only_decode_changed(decode_only: list[Generated], stock: list[Generated]) -> None:
    """The prompt and the first token come from prefill; the decode budget must not touch them."""
    for reduced, original in zip(decode_only, stock, strict=True):
        assert reduced.prompt_logprobs == original.prompt_logprobs
        assert reduced.logprobs[0] == original.logprobs[0]
    assert [g.logprobs for g in decode_only] != [g.logprobs for g in stock]


def _assert_obeyed(counted: WorkerCounters, mode: str, budget: int, full: int) -> None:
    """Every sampled decode token used its budget, exactly where the mode promises a count."""
    assert counted.sampled_decode_tokens > 0
    mean = counted.sampled_decode_activations / counted.sampled_decode_tokens
    assert mean < full if mode == "threshold" else mean == budget
    assert counted.sampled_prefill_activations == full * counted.sampled_prefill_tokens


def _start_line(log: Path) -> str:
    return next(line for line in log.read_text().splitlines() if "sglang-alloc is in force" in line)
