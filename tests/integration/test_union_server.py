"""Mode `union` on a real server: a smaller budget lets a decode step touch fewer experts."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

import httpx2
import pytest
from generation import generate, generate_together

from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.server_runs.budget_override import BudgetOverride
from sglang_alloc.server_runs.reference_files import MODEL, REFERENCE
from sglang_alloc.server_runs.server_process import serve
from sglang_alloc.shared_table import SharedTable, WorkerCounters, publish_shared_table
from sglang_alloc.table_status import table_status

pytestmark = pytest.mark.server

CONCURRENCY, PROMPT_TOKENS, NEW_TOKENS = 8, 96, 64
BUDGETS = (40, 20, 8)


class Measured(NamedTuple):
    """What one budget did: continuations, experts per layer and step, slots per token."""

    continuations: list[list[int]]
    distinct_experts: float
    activations: float


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    text = (REFERENCE / "samples" / "heldout_docs.txt").read_bytes()
    step = len(text) // CONCURRENCY
    return [list(text[i * step :][:PROMPT_TOKENS]) for i in range(CONCURRENCY)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, SharedTable]]:
    folder = tmp_path_factory.mktemp("union")
    path = folder / "union.tbl"
    publish_shared_table(path, load_budget_tables(MODEL / "budget_tables.npz"), mode_note="union")
    arguments = ("--dtype", "float32", "--skip-server-warmup", "--disable-radix-cache")
    with (
        serve(MODEL, table=path, log_path=folder / "server.log", extra_args=arguments) as server,
        SharedTable.open(path) as table,
    ):
        yield server.url, table


@pytest.fixture(scope="module")
def measured(served: tuple[str, SharedTable], prompts: list[list[int]]) -> dict[int, Measured]:
    url, table = served
    override, layers = BudgetOverride(table), table.shape.num_layers
    found = {}
    for budget in BUDGETS:
        override.set(table.shape.budget_max, budget)
        before = table.worker_counters()[0]
        answers = generate_together(url, prompts, NEW_TOKENS)
        override.set(table.shape.budget_max, table.shape.budget_max)
        after = table.worker_counters()[0]
        counted = WorkerCounters(*(b - a for a, b in zip(before, after, strict=True)))
        found[budget] = Measured(
            [list(answer.tokens) for answer in answers],
            counted.distinct_experts / counted.sampled_decode_steps / layers,
            counted.sampled_decode_activations / counted.sampled_decode_tokens,
        )
    return found


def test_distinct_experts_of_a_step_fall_with_the_budget(measured: dict[int, Measured]) -> None:
    full, half, fifth = (measured[budget].distinct_experts for budget in BUDGETS)
    assert half < 0.75 * full
    assert fifth < 0.6 * half


def test_slots_ride_on_what_others_opened(measured: dict[int, Measured]) -> None:
    for budget in BUDGETS[1:]:
        assert budget < measured[budget].activations < BUDGETS[0]


def test_half_the_budget_writes_text_that_the_full_model_finds_as_likely(
    served: tuple[str, SharedTable], prompts: list[list[int]], measured: dict[int, Measured]
) -> None:
    url, _ = served
    full, half, _ = (
        fmean(_loss(url, prompt, text) for prompt, text in zip(prompts, texts, strict=True))
        for texts in (measured[budget].continuations for budget in BUDGETS)
    )
    assert half < full + 0.1
    uniform = 5.5  # nats per token of a guess among the model's bytes
    assert full < uniform / 4


def test_the_status_shows_the_measured_set(served: tuple[str, SharedTable]) -> None:
    _, table = served
    worker = table_status(table, now_ns=0).workers[0]
    assert worker.distinct_experts_per_layer is not None
    assert 8 <= worker.distinct_experts_per_layer <= table.shape.num_experts


def test_sglangs_metrics_show_the_quotas_of_the_union_rows(
    served: tuple[str, SharedTable],
) -> None:
    url, _ = served
    metrics = httpx2.get(f"{url}/metrics", timeout=10.0, trust_env=False).text
    assert "sglang_alloc_distinct_experts_per_step{" in metrics
    assert 'sglang_alloc_quota_activations{layer="0",phase="decode"' in metrics


def _loss(url: str, prompt: list[int], continuation: list[int]) -> float:
    """Nats per token of a continuation, by the model at full budget."""
    scored = generate(url, prompt + continuation, new_tokens=1).prompt_logprobs
    logprobs = [logprob for logprob in scored[len(prompt) :] if logprob is not None]
    return -fmean(logprobs)
