"""Requests with budgets of their own on a real server, with chunked prefill and mixed batches.

The mode is `layer`, which spends its budget exactly, so that counts say who got what.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from generation import GREEDY, Generated, generate

from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.priority_floors import PRIORITY_FLOORS_VARIABLE
from sglang_alloc.request_budget import PARAMETER
from sglang_alloc.server_runs.budget_override import BudgetOverride
from sglang_alloc.server_runs.reference_files import MODEL, REFERENCE
from sglang_alloc.server_runs.server_process import serve
from sglang_alloc.shared_table import SharedTable, WorkerCounters, publish_shared_table
from sglang_alloc.worker_settings import REQUEST_BUDGETS_VARIABLE

pytestmark = pytest.mark.server

BUDGET, CEILING, FLOOR = 15, 8, 24
PREFERRED, URGENT = 5, 10  # priorities from which on requests have the floor, and full quality
FULL = {PARAMETER: "full"}
ARGUMENTS = (
    *("--dtype", "float32", "--skip-server-warmup", "--disable-radix-cache"),
    *("--chunked-prefill-size", "64", "--enable-mixed-chunk", "--enable-priority-scheduling"),
)
ENVIRONMENT = {
    REQUEST_BUDGETS_VARIABLE: "any",
    PRIORITY_FLOORS_VARIABLE: f"{PREFERRED}:{FLOOR},{URGENT}:full",
}


@dataclass
class Served:
    """The server, and what it counts."""

    url: str
    table: SharedTable
    override: BudgetOverride
    log: Path

    def counted(self, work: Callable[[], Any]) -> WorkerCounters:
        """Return what the server counted while `work` was done; setting budgets reports."""
        self.override.set(BUDGET, BUDGET)
        before = self.table.worker_counters()[0]
        work()
        self.override.set(BUDGET, BUDGET)
        after = self.table.worker_counters()[0]
        return WorkerCounters(*(b - a for a, b in zip(before, after, strict=True)))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("own-budgets")
    path, log = folder / "layer.tbl", folder / "server.log"
    publish_shared_table(path, load_budget_tables(MODEL / "budget_tables.npz"), mode_note="layer")
    with (
        serve(MODEL, table=path, log_path=log, extra_args=ARGUMENTS, env=ENVIRONMENT) as server,
        SharedTable.open(path) as table,
    ):
        yield Served(server.url, table, BudgetOverride(table), log)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    text = (REFERENCE / "samples" / "heldout_docs.txt").read_bytes()
    return [list(text[start : start + 150]) for start in range(0, 4_000, 1_000)]


@pytest.fixture(scope="module")
def at_full(served: Served, prompts: list[list[int]]) -> Generated:
    """The first prompt, alone, with every request at full quality."""
    full = served.table.shape.budget_max
    served.override.set(full, full)
    return generate(served.url, prompts[0], 32)


def test_a_protected_request_is_served_as_at_full_budget_bit_for_bit(
    served: Served, prompts: list[list[int]], at_full: Generated
) -> None:
    served.override.set(BUDGET, BUDGET)
    assert generate(served.url, prompts[0], 32, custom_params=FULL) == at_full
    assert generate(served.url, prompts[0], 32, priority=URGENT) == at_full
    reduced = generate(served.url, prompts[0], 32)
    assert reduced.prompt_logprobs != at_full.prompt_logprobs


def test_beside_a_protected_request_the_others_stay_at_their_budget(
    served: Served, prompts: list[list[int]], at_full: Generated
) -> None:
    protected, counted = _beside_others(served, prompts, custom_params=FULL)
    # A batch adds up in another order than a request alone, so the last bits may differ.
    assert protected.tokens == at_full.tokens
    np.testing.assert_allclose(protected.logprobs, at_full.logprobs, atol=2e-3)
    _require_two_budgets(counted, served.table.shape.budget_max)


def test_a_class_has_its_floor_while_its_neighbours_are_reduced(
    served: Served, prompts: list[list[int]]
) -> None:
    served.override.set(FLOOR, FLOOR)
    at_floor = generate(served.url, prompts[0], 32)
    served.override.set(BUDGET, BUDGET)
    assert generate(served.url, prompts[0], 32, priority=PREFERRED) == at_floor
    floored, counted = _beside_others(served, prompts, priority=PREFERRED)
    assert floored.tokens == at_floor.tokens
    np.testing.assert_allclose(floored.logprobs, at_floor.logprobs, atol=2e-3)
    _require_two_budgets(counted, FLOOR)


@pytest.mark.parametrize("wish", [{}, {PARAMETER: CEILING}])
def test_a_class_has_its_floor_whatever_its_requests_ask(
    served: Served, prompts: list[list[int]], wish: dict[str, Any]
) -> None:
    def of_class() -> None:
        generate(served.url, prompts[0], 48, priority=URGENT - 1, custom_params=wish)

    counted = served.counted(of_class)
    assert counted.sampled_decode_activations == FLOOR * counted.sampled_decode_tokens > 0
    assert counted.sampled_prefill_activations == FLOOR * counted.sampled_prefill_tokens


def test_a_ceiling_lowers_its_request_alone(served: Served, prompts: list[list[int]]) -> None:
    def ceiled() -> None:
        generate(served.url, prompts[0], 48, custom_params={PARAMETER: CEILING})

    counted = served.counted(ceiled)
    assert counted.sampled_decode_tokens > 0
    assert counted.sampled_decode_activations == CEILING * counted.sampled_decode_tokens
    assert counted.sampled_prefill_activations == CEILING * counted.sampled_prefill_tokens
    counted = served.counted(lambda: generate(served.url, prompts[0], 48))
    assert counted.sampled_decode_activations == BUDGET * counted.sampled_decode_tokens


def test_a_ceiling_above_the_budget_in_force_changes_nothing(
    served: Served, prompts: list[list[int]]
) -> None:
    served.override.set(BUDGET, BUDGET)
    plain = generate(served.url, prompts[0], 8)
    assert generate(served.url, prompts[0], 8, custom_params={PARAMETER: BUDGET + 9}) == plain


@pytest.mark.parametrize("wish", ["half", 7.5, True, 0, 4, 41, [8], {"budget": 8}])
@pytest.mark.parametrize("endpoint", ["/generate", "/v1/completions"])
def test_a_wish_that_cannot_be_granted_is_a_bad_request(
    served: Served, endpoint: str, wish: object
) -> None:
    answer = _ask(served, endpoint, {PARAMETER: wish})
    assert answer.status_code == 400
    assert PARAMETER in answer.text


@pytest.mark.parametrize("custom_params", [{}, {"other": 1}, None])
def test_other_custom_parameters_are_none_of_our_business(
    served: Served, custom_params: dict[str, Any] | None
) -> None:
    assert _ask(served, "/generate", custom_params).status_code == 200


def test_the_openai_endpoint_passes_the_wish_on(served: Served) -> None:
    counted = served.counted(
        lambda: _ask(served, "/v1/completions", {PARAMETER: CEILING}).raise_for_status()
    )
    assert counted.sampled_decode_activations == CEILING * counted.sampled_decode_tokens > 0


def test_tokens_above_and_below_the_budget_are_counted_in_sglangs_metrics(served: Served) -> None:
    metrics = httpx2.get(f"{served.url}/metrics", timeout=10.0, trust_env=False).text
    for budget in ("full", "floor", "lower"):
        label = f'sglang_alloc_own_budget_tokens_total{{budget="{budget}"'
        (line,) = [line for line in metrics.splitlines() if line.startswith(label)]
        assert float(line.split()[-1]) > 0
    assert "sglang_alloc_own_budgets_ignored_total" in metrics


def test_an_aborted_request_leaves_the_others_their_budget(
    served: Served, prompts: list[list[int]]
) -> None:
    def abort_one_of_two() -> None:
        body = _body(prompts[1], 400, FULL) | {"stream": True, "rid": "to-be-aborted"}
        with ThreadPoolExecutor(1) as pool:
            with httpx2.stream(
                "POST", f"{served.url}/generate", json=body, timeout=60.0, trust_env=False
            ) as stream:
                chunks = (line for line in stream.iter_lines() if line.startswith("data:"))
                next(chunks)
                other = pool.submit(generate, served.url, prompts[2], 96)
                next(chunks)
                _post(served, "/abort_request", {"rid": "to-be-aborted"})
                last = [json.loads(line[5:]) for line in chunks if "[DONE]" not in line][-1]
            assert last["meta_info"]["finish_reason"]["type"] == "abort"
            assert len(other.result().tokens) == 96

    served.counted(abort_one_of_two)
    counted = served.counted(lambda: generate(served.url, prompts[2], 48))
    assert counted.sampled_decode_activations == BUDGET * counted.sampled_decode_tokens


def test_weights_are_replaced_under_a_reduced_budget(
    served: Served, prompts: list[list[int]], tmp_path: Path
) -> None:
    served.override.set(BUDGET, BUDGET)
    before = generate(served.url, prompts[0], 8)
    _post(served, "/update_weights_from_disk", {"model_path": str(_scaled_model(tmp_path))})
    changed = generate(served.url, prompts[0], 8)
    counted = served.counted(lambda: generate(served.url, prompts[0], 48))
    _post(served, "/update_weights_from_disk", {"model_path": str(MODEL)})
    assert changed.prompt_logprobs != before.prompt_logprobs
    assert counted.sampled_decode_activations == BUDGET * counted.sampled_decode_tokens > 0
    assert generate(served.url, prompts[0], 8) == before


def _beside_others(
    served: Served, prompts: list[list[int]], **kind: Any
) -> tuple[Generated, WorkerCounters]:
    """Serve the first prompt, as a request of this kind, beside the others; count meanwhile."""
    found: list[Generated] = []

    def together() -> None:
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(generate, served.url, prompts[0], 32, **kind)
            others = [pool.submit(generate, served.url, p, 96) for p in prompts[1:]]
            found.append(first.result())
            assert all(len(other.result().tokens) == 96 for other in others)
        for of_kind in (kind, {}):  # one prefill in four is measured: of each kind four in a row
            for _ in range(4):
                generate(served.url, prompts[0], 1, **of_kind)

    counted = served.counted(together)
    return found[0], counted


def _require_two_budgets(counted: WorkerCounters, higher: int) -> None:
    """Some tokens had `higher` activations and all others the budget in force, in both phases."""
    for phase in ("prefill", "decode"):
        tokens = getattr(counted, f"sampled_{phase}_tokens")
        activations = getattr(counted, f"sampled_{phase}_activations")
        of_higher = (activations - BUDGET * tokens) / (higher - BUDGET)
        assert of_higher == int(of_higher), "somebody was served at another budget"
        assert 0 < of_higher < tokens


def _scaled_model(folder: Path) -> Path:
    """Return a copy of the model whose experts' outputs are a tenth larger."""
    from safetensors.torch import load_file, save_file

    for file in MODEL.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(MODEL / "model.safetensors")
    scaled = {n: w * 1.1 if "experts" in n and "down" in n else w for n, w in weights.items()}
    assert any("experts" in name and "down" in name for name in weights)
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _body(prompt: list[int], new_tokens: int, custom_params: object) -> dict[str, Any]:
    sampling = {**GREEDY, "max_new_tokens": new_tokens, "custom_params": custom_params}
    return {"input_ids": prompt, "sampling_params": sampling}


def _ask(served: Served, endpoint: str, custom_params: object) -> httpx2.Response:
    body = _body(list(b"A request with a wish. "), 48, custom_params)
    if endpoint == "/v1/completions":
        body = {"model": "any", "prompt": body["input_ids"], "max_tokens": 48, "temperature": 0}
        body |= {"custom_params": custom_params, "ignore_eos": True}
    return httpx2.post(f"{served.url}{endpoint}", json=body, timeout=60.0, trust_env=False)


def _post(served: Served, endpoint: str, body: dict[str, Any]) -> None:
    answer = httpx2.post(f"{served.url}{endpoint}", json=body, timeout=60.0, trust_env=False)
    answer.raise_for_status()
