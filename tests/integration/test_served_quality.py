"""The server gives the losses that the evaluation measures in its own process, budget by budget.

One server of the trained reference model, in the default mode, serves all the tests here.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import torch
import yaml
from click.testing import Result
from generation import GREEDY, Generated, generate
from torch import Tensor
from typer.testing import CliRunner
from waiting import wait_until

from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.cli import app
from sglang_alloc.evaluation.harness import HarnessError, HarnessRun, run_harness
from sglang_alloc.evaluation.material import domains_in_turn
from sglang_alloc.evaluation.rules import Subject, served_threshold
from sglang_alloc.reference.export import load_checkpoint
from sglang_alloc.reference.heldout import token_losses
from sglang_alloc.server_runs.budget_override import BudgetOverride, flush_cache
from sglang_alloc.server_runs.reference_files import MODEL, REFERENCE
from sglang_alloc.server_runs.server_process import serve
from sglang_alloc.shared_table import SharedTable, publish_shared_table

pytestmark = pytest.mark.server

WINDOWS, WINDOW_TOKENS = 6, 384
BUDGETS = (13, 20, 33, 40)
# Eight requests at once fill a prefill, and one prefill in four is measured: fewer than 32 requests
# (two a document) may leave a budget without a figure.
DOCUMENTS, CONTEXT_BYTES, CHOICE_BYTES = 20, 200, 40
SMALLEST, FULL = 5, 40


class Served(NamedTuple):
    url: str
    path: Path
    table: SharedTable
    override: BudgetOverride

    def at(self, budget: int) -> None:
        """Put a budget in force on an empty prefix cache."""
        self.override.set(budget, budget)
        with httpx2.Client(base_url=self.url, trust_env=False) as client:
            flush_cache(client)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    path = folder / "reference.tbl"
    publish_shared_table(path, load_budget_tables(MODEL / "budget_tables.npz"))
    options = ("--dtype", "float32", "--skip-server-warmup")
    with (
        serve(MODEL, table=path, log_path=folder / "server.log", extra_args=options) as server,
        SharedTable.open(path) as table,
    ):
        yield Served(server.url, path, table, BudgetOverride(table))


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would spin against the server
    with ThreadPoolExecutor(1) as executor:
        tables = load_budget_tables(MODEL / "budget_tables.npz")
        yield Subject(load_checkpoint(MODEL), tables, torch.zeros(0), executor)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_servers_losses_are_the_evaluations(
    served: Served, subject: Subject, budget: int
) -> None:
    windows = domains_in_turn("heldout", WINDOWS, WINDOW_TOKENS)
    full = budget == subject.tables.budget_max
    rule = None if full else served_threshold(subject, budget)
    # The evaluation reads the decode rows; the reference tables have no others for prefill.
    expected = token_losses(subject.model, windows, rule)
    served.at(budget)
    found = torch.stack([_served_losses(served.url, window) for window in windows])
    torch.testing.assert_close(found.mean(1), expected.mean(1), atol=2e-4, rtol=0)
    # A score at the threshold may fall on either side of it, so single bytes may differ a little.
    assert (found - expected).abs().mean() < 2e-4


def _served_losses(url: str, window: Tensor) -> Tensor:
    """Loss (S,) of each next byte of a window (S + 1,), from the logprobs of a prompt."""
    body: dict[str, Any] = {
        "input_ids": window.tolist(),
        "sampling_params": {**GREEDY, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    response = httpx2.post(f"{url}/generate", json=body, timeout=120.0, trust_env=False)
    response.raise_for_status()
    logprobs = response.json()["meta_info"]["input_token_logprobs"]
    return torch.tensor([-logprob for logprob, *_ in logprobs[1:]])


def test_in_threshold_mode_a_request_answers_the_same_among_others(served: Served) -> None:
    prompts = [window[:96].tolist() for window in domains_in_turn("heldout", 8, 96)]
    served.at(16)
    alone = generate(served.url, prompts[0], new_tokens=24)
    served.at(16)
    with ThreadPoolExecutor(len(prompts)) as pool:
        among, *_ = pool.map(lambda p: generate(served.url, p, new_tokens=24), prompts)
    assert among.tokens == alone.tokens
    # Not bit for bit: SGLang's own kernels add up in another order in another batch.
    assert _largest_difference(among, alone) < 1e-3


def _largest_difference(first: Generated, second: Generated) -> float:
    return max(abs(a - b) for a, b in zip(first.logprobs, second.logprobs, strict=True))


class Harness(NamedTuple):
    """What lm-evaluation-harness was asked, and the folder of what it found."""

    folder: Path
    result: Result


def _documents() -> list[dict[str, Any]]:
    """Held-out text, how it goes on, and the same read backwards."""
    text = (REFERENCE / "samples" / "heldout_docs.txt").read_text()
    pieces = [text[i * 1000 :][: CONTEXT_BYTES + CHOICE_BYTES] for i in range(DOCUMENTS)]
    following = [piece[CONTEXT_BYTES:] for piece in pieces]
    return [
        {"context": piece[:CONTEXT_BYTES], "choices": [right, right[::-1]]}
        for piece, right in zip(pieces, following, strict=True)
    ]


@pytest.fixture(scope="module")
def harness(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """Run a task of our own, without any network, at the smallest and at the full budget."""
    folder = tmp_path_factory.mktemp("harness")
    data = folder / "next.jsonl"
    data.write_text("\n".join(map(json.dumps, _documents())))
    task = {
        "task": "how_it_goes_on",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    served.override.clear()
    command = [
        *("evaluate-served", served.url, "--table", str(served.path), "--tokenizer", str(MODEL)),
        *("--budget", str(SMALLEST), "--budget", "full", "-o", str(folder / "out"), "--"),
        *("--tasks", "how_it_goes_on", "--include_path", str(folder), "--log_samples"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(folder / "home"))
        return Harness(folder / "out", CliRunner().invoke(app, command))


def test_the_harness_scores_each_budget_and_what_was_kept(harness: Harness) -> None:
    assert harness.result.exit_code == 0, harness.result.output
    with (harness.folder / "scores.csv").open() as file:
        rows = {int(row["budget"]): row for row in csv.DictReader(file)}
    assert set(rows) == {SMALLEST, FULL}
    for budget, row in rows.items():
        assert (row["task"], row["metric"]) == ("how_it_goes_on", "acc")
        assert 0 <= float(row["value"]) <= 1
        assert float(row["prefill_activations"]) == pytest.approx(budget, rel=0.05)
    assert float(rows[FULL]["value"]) >= 0.8


@pytest.mark.parametrize("budget", [SMALLEST, FULL])
def test_the_harness_sees_the_losses_of_its_budget(
    harness: Harness, subject: Subject, budget: int
) -> None:
    samples = next((harness.folder / f"budget-{budget}").rglob("samples_*.jsonl"))
    rule = None if budget == FULL else served_threshold(subject, budget)
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        context, choice = sample["doc"]["context"], sample["doc"]["choices"][0]
        # The harness counts spaces at the end of the context to the choice.
        scored = len((context + choice).encode()) - len(context.rstrip().encode())
        window = torch.tensor([list((context + choice).encode())])
        expected = token_losses(subject.model, window, rule)[0, -scored:].sum()
        assert -float(sample["filtered_resps"][0][0]) == pytest.approx(float(expected), abs=0.02)


def test_the_budget_is_released_after_the_harness(harness: Harness, served: Served) -> None:
    assert harness.result.exit_code == 0
    assert served.table.override(time.monotonic_ns()) is None


def test_a_budget_that_is_lost_during_the_harness_ends_it(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.override.clear()
    waiting = tmp_path / "lm_eval"  # stands in for lm_eval in mid-run
    runs = tmp_path / "runs"
    waiting.write_text(f"#!/bin/sh\ntouch {runs}\nexec sleep 60\n")
    waiting.chmod(0o755)
    monkeypatch.setattr("sglang_alloc.evaluation.harness.find_harness", lambda: str(waiting))
    asked = HarnessRun(served.url, served.path, 20, str(MODEL), tmp_path, ())
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_harness, asked)
        wait_until(runs.exists, "the harness runs")
        BudgetOverride(served.table, actor="somebody").set(30, 30)
        with pytest.raises(HarnessError, match="stopped obeying budget 20: it is at 30/30"):
            run.result()
    override = served.table.override(time.monotonic_ns())
    assert override is not None
    assert override.actor == "somebody"
