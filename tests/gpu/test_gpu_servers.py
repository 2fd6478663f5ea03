"""Real servers with dummy weights on a GPU: captured graphs, and budgets set while they run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import httpx2
import pytest

from moe_bench.dummy_models import write_model
from moe_bench.server_bench import Budgeted, Case, ServerPlan, serve_together, settle, used_since
from sglang_alloc.demo.heldout_loss import BudgetOverride
from sglang_alloc.demo.server_process import Server

LAYERS = 4  # of the model, so that three servers start quickly; three have experts
PLAN = ServerPlan(
    modes=("layer", "union"),
    concurrencies=(1, 8),
    prefill_tokens=(),
    model_changes={"num_hidden_layers": LAYERS},
    beside=2,
)


class Servers(NamedTuple):
    """Stock, and one server per mode."""

    stock: Server
    budgeted: dict[str, Budgeted]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    model = write_model(folder / "DeepSeek-V2-Lite", "DeepSeek-V2-Lite", **PLAN.model_changes)
    with ExitStack() as stack:
        stock, budgeted = serve_together(stack, model, PLAN.modes, PLAN, folder)
        yield Servers(stock, {one.mode: one for one in budgeted})


def _answer(server: Server, seed: int, tokens: int = 24) -> list[int]:
    """Return the tokens of one greedy answer to a prompt drawn by the seed."""
    generator = random.Random(seed)
    prompt = [generator.randrange(2, 500) for _ in range(40)]
    sampling = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling}
    response = httpx2.post(f"{server.url}/generate", json=body, timeout=120.0, trust_env=False)
    assert response.status_code == 200, response.text[:300]
    answer: Any = response.json()["output_ids"]
    return list(answer)


@pytest.mark.parametrize("mode", PLAN.modes)
def test_a_full_budget_answers_as_stock_does(servers: Servers, mode: str) -> None:
    """Both before a budget was ever set, and behind a smaller one."""
    one = servers.budgeted[mode]
    for seed in range(4):
        assert _answer(one.server, seed) == _answer(servers.stock, seed)
    override = BudgetOverride(one.table)
    override.set(one.table.shape.budget_min, one.table.shape.budget_min)
    _answer(one.server, 0)
    override.set(one.table.shape.budget_max, one.table.shape.budget_max)
    for seed in range(4):
        assert _answer(one.server, seed) == _answer(servers.stock, seed)


@pytest.mark.parametrize("share", [1.0, 0.5, 1 / 3])
def test_captured_decode_steps_keep_what_the_budget_says(servers: Servers, share: float) -> None:
    """No recapture: all shares run in the graphs that the server recorded when it started."""
    one = servers.budgeted["layer"]
    budget = round(share * one.table.shape.budget_max)
    BudgetOverride(one.table).set(budget, budget)
    case = Case("decode", 1)
    settle(one.server, case)
    before = one.table.worker_counters()[0]
    _answer(one.server, 7, tokens=40)
    settle(one.server, case)
    used = used_since(before, one.table.worker_counters()[0], case, one.table)
    assert used.activations_per_token == pytest.approx(budget / one.table.shape.num_layers)
    assert used.distinct_experts == pytest.approx(budget / one.table.shape.num_layers)
