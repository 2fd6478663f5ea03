"""Real servers with dummy weights on a GPU: captured graphs, and budgets set while they run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Without these the kernels' tests beside this file still run.
httpx2 = pytest.importorskip("httpx2", reason="the servers' tests need this project installed")
pytest.importorskip("typer", reason="the servers' tests need this project installed")

from moe_bench.dummy_models import write_model  # noqa: E402
from moe_bench.server_bench import (  # noqa: E402
    Budgeted,
    Case,
    ServerPlan,
    serve_together,
    settle,
    used_since,
)
from sglang_alloc.server_runs.budget_override import BudgetOverride  # noqa: E402
from sglang_alloc.server_runs.server_process import Server  # noqa: E402

LAYERS = 4  # of the model, so that its servers start quickly; three have experts
BATCH = 5  # padded to the graph of 8
PLAN = ServerPlan(
    modes=("layer", "threshold", "union", "layer+fused", "union+fused"),
    concurrencies=(1, 8),
    prefill_tokens=(),
    model_changes={"num_hidden_layers": LAYERS},
)


# Graphs of prefill too, captured in pieces.
PREFILL_TOKENS = 64
BREAKABLE = PLAN._replace(
    arguments=(*PLAN.arguments, "--cuda-graph-backend-prefill", "breakable"),
    modes=("layer",),
    prefill_tokens=(PREFILL_TOKENS,),
)


class Servers(NamedTuple):
    """Stock, and one server per mode."""

    stock: Server
    budgeted: dict[str, Budgeted]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with _served(PLAN, tmp_path_factory.mktemp("servers")) as served:
        yield served


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with _served(BREAKABLE, tmp_path_factory.mktemp("breakable")) as served:
        yield served


@contextmanager
def _served(plan: ServerPlan, folder: Path) -> Iterator[Servers]:
    model = write_model(folder / "DeepSeek-V2-Lite", "DeepSeek-V2-Lite", **plan.model_changes)
    with ExitStack() as stack:
        stock, budgeted = serve_together(stack, model, plan.modes, plan, folder)
        yield Servers(stock, {one.mode: one for one in budgeted})


def _answers(
    server: Server, seed: int, requests: int = 1, tokens: int = 24, prompt_tokens: int = 40
) -> list[Any]:
    """Return (token, logprob) pairs of greedy answers to prompts drawn by the seed."""
    generator = random.Random(seed)
    prompts = [[generator.randrange(2, 500) for _ in range(prompt_tokens)] for _ in range(requests)]
    body = {
        "input_ids": prompts,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True},
        "return_logprob": True,
    }
    response = httpx2.post(f"{server.url}/generate", json=body, timeout=120.0, trust_env=False)
    assert response.status_code == 200, response.text[:300]
    answers = [one["meta_info"]["output_token_logprobs"] for one in response.json()]
    assert [len(one) for one in answers] == [tokens] * requests
    return answers


@pytest.mark.parametrize("mode", ["layer", "threshold", "union"])
def test_a_full_budget_answers_as_stock_does(servers: Servers, mode: str) -> None:
    """Tokens and logprobs, before a budget was ever set and behind a smaller one."""
    _assert_full_budget_is_stock(servers, mode)


def test_a_full_budget_answers_as_stock_does_with_prefill_captured_in_pieces(
    breakable: Servers,
) -> None:
    _assert_full_budget_is_stock(breakable, "layer")


def _assert_full_budget_is_stock(servers: Servers, mode: str) -> None:
    one = servers.budgeted[mode]
    for seed in range(4):
        assert _answers(one.server, seed) == _answers(servers.stock, seed)
    override = BudgetOverride(one.table)
    override.set(one.table.shape.budget_min, one.table.shape.budget_min)
    _answers(one.server, 0, BATCH)
    override.set(one.table.shape.budget_max, one.table.shape.budget_max)
    for seed in range(4):
        assert _answers(one.server, seed) == _answers(servers.stock, seed)


@pytest.mark.parametrize("share", [1.0, 0.5, 1 / 3])
def test_prefill_captured_in_pieces_keeps_what_the_budget_says(
    breakable: Servers, share: float
) -> None:
    """A prompt shorter than the graph, so that there is padding, and one as long."""
    one = breakable.budgeted["layer"]
    budget = round(share * one.table.shape.budget_max)
    BudgetOverride(one.table).set(budget, budget)
    settle([one.server], Case("decode", 1))
    for prompt_tokens in (PREFILL_TOKENS, PREFILL_TOKENS - 5):
        before = one.table.worker_counters()[0]
        _answers(one.server, 5, prompt_tokens=prompt_tokens, tokens=1)
        settle([one.server], Case("decode", 1))
        after = one.table.worker_counters()[0]
        used = used_since(before, after, Case("prefill", prompt_tokens), one.table)
        assert used.activations_per_token == pytest.approx(budget / one.table.shape.num_layers)


@pytest.mark.parametrize("mode", ["layer+fused", "union+fused"])
def test_our_kernel_routes_every_layer_and_chooses_as_sglang_does(
    servers: Servers, mode: str
) -> None:
    """Weights may differ in their last bits, so logprobs do, a little."""
    one = servers.budgeted[mode]
    assert "routes 3 of 3 MoE layers by one kernel" in one.server.process.log_path.read_text()
    BudgetOverride(one.table).set(one.table.shape.budget_max, one.table.shape.budget_max)
    for seed in range(4):
        ours, theirs = (_answers(server, seed)[0] for server in (one.server, servers.stock))
        assert ours[0][1] == theirs[0][1]
        assert ours[0][0] == pytest.approx(theirs[0][0], abs=0.02)


@pytest.mark.parametrize("mode", ["layer", "layer+fused"])
def test_padding_of_a_captured_batch_lights_no_expert(servers: Servers, mode: str) -> None:
    one = servers.budgeted[mode]
    BudgetOverride(one.table).set(one.table.shape.budget_min, one.table.shape.budget_min)
    case = Case("decode", BATCH)
    settle([one.server], Case("decode", 1))
    before = one.table.worker_counters()[0]
    _answers(one.server, 3, BATCH)
    settle([one.server], Case("decode", 1))
    used = used_since(before, one.table.worker_counters()[0], case, one.table)
    assert used.activations_per_token == 1.0
    assert used.distinct_experts is not None
    assert used.distinct_experts <= BATCH


@pytest.mark.parametrize("mode", ["layer", "layer+fused"])
@pytest.mark.parametrize("share", [1.0, 0.5, 1 / 3])
def test_captured_decode_steps_keep_what_the_budget_says(
    servers: Servers, mode: str, share: float
) -> None:
    """No recapture: all shares run in the graphs that the server recorded when it started."""
    one = servers.budgeted[mode]
    budget = round(share * one.table.shape.budget_max)
    BudgetOverride(one.table).set(budget, budget)
    case = Case("decode", 1)
    settle([one.server], case)
    before = one.table.worker_counters()[0]
    _answers(one.server, 7, tokens=40)
    settle([one.server], case)
    used = used_since(before, one.table.worker_counters()[0], case, one.table)
    assert used.activations_per_token == pytest.approx(budget / one.table.shape.num_layers)
    assert used.distinct_experts == pytest.approx(budget / one.table.shape.num_layers)
