"""Two tensor-parallel ranks of a real server give calm steps larger budgets than the others."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest
import tiny_models
from generation import Generated, generate
from waiting import wait_until

from sglang_alloc.server_runs.budget_override import BudgetOverride
from sglang_alloc.server_runs.server_process import serve
from sglang_alloc.shared_table import (
    CalmBudgets,
    CalmTokens,
    SelectorWriter,
    SharedTable,
    publish_shared_table,
)
from sglang_alloc.shared_table_words import RUNNING_ANY, source_code
from sglang_alloc.worker_settings import STALE_AFTER_VARIABLE, STEP_RECORD_VARIABLE

pytestmark = pytest.mark.server

# Two places in a batch, and no cache that would let a second run of a prompt skip its prefill.
ARGUMENTS = (
    *("--dtype", "float32", "--tp-size", "2", "--skip-server-warmup"),
    *("--disable-radix-cache", "--max-running-requests", "2"),
)
ENVIRONMENT = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", STALE_AFTER_VARIABLE: "600"}
PROMPT = [(7 * i + 3) % 256 for i in range(60)]
BURST = [[(5 * i + r) % 256 for i in range(40 + r)] for r in range(10)]
NEW_TOKENS = 24
PHASES = ("prefill", "decode")


class Step(NamedTuple):
    """One line of a step record, without its time, which each rank has its own of."""

    step: int
    source: str
    phase: str
    budgets: tuple[int, int]
    num_tokens: int


@dataclass
class Story:
    """What was served and recorded, in this order: full, low, one request calm, a burst, a pair.

    Before the pair, steps with two running requests are no longer called calm.
    """

    low: tuple[int, int]
    full: tuple[int, int]
    at_full: Generated
    at_low: Generated
    alone: Generated
    burst: list[Generated]
    steps_alone: list[Step]
    steps_of_burst: list[Step]
    counted_in_burst: CalmTokens
    steps_of_pair: list[Step]
    metrics: str
    by_rank: list[list[Step]]


@pytest.fixture(scope="module")
def story(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder, model = tmp_path_factory.mktemp("calm"), tiny_model("qwen3_moe")
    publish_shared_table(folder / "t.tbl", tiny_models.make_tables(model), mode_note="layer")
    with (
        serve(
            model,
            table=folder / "t.tbl",
            mode="layer",
            log_path=folder / "server.log",
            extra_args=ARGUMENTS,
            env={**ENVIRONMENT, STEP_RECORD_VARIABLE: str(folder / "steps")},
        ) as server,
        SharedTable.open(folder / "t.tbl") as table,
        SelectorWriter.acquire(table) as writer,
    ):
        return _served(server.url, table, writer, folder / "steps")


def _served(url: str, table: SharedTable, writer: SelectorWriter, record: Path) -> Story:
    shape = table.shape
    low, full = (shape.budget_min, shape.budget_min + 1), (shape.budget_max, shape.budget_max)
    override = BudgetOverride(table)
    override.set(*full)
    at_full = generate(url, PROMPT, NEW_TOKENS)
    override.set(*low)
    at_low = generate(url, PROMPT, NEW_TOKENS)
    table.clear_override()
    _control(table, writer, low, full)
    begun = len(_steps(record, 0))
    alone = generate(url, PROMPT, NEW_TOKENS)
    steps_alone = _steps(record, 0)[begun:]
    _control(table, writer, low, full)
    begun, before = len(_steps(record, 0)), table.calm_tokens()[0]
    with ThreadPoolExecutor(len(BURST)) as pool:
        burst = list(pool.map(lambda prompt: generate(url, prompt, NEW_TOKENS), BURST))
    _control(table, writer, low, full)
    after, steps_of_burst = table.calm_tokens()[0], _steps(record, 0)[begun:]
    _control(table, writer, low, full, running_requests=2)
    begun = len(_steps(record, 0))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(generate, [url] * 2, BURST, (NEW_TOKENS, 3 * NEW_TOKENS)))
    _control(table, writer, low, full)
    return Story(
        low=low,
        full=full,
        at_full=at_full,
        at_low=at_low,
        alone=alone,
        burst=burst,
        steps_alone=steps_alone,
        steps_of_burst=steps_of_burst,
        counted_in_burst=CalmTokens(*(b - a for a, b in zip(before, after, strict=True))),
        steps_of_pair=_steps(record, 0)[begun:],
        metrics=httpx2.get(f"{url}/metrics", timeout=10.0, trust_env=False).text,
        by_rank=[_steps(record, rank) for rank in (0, 1)],
    )


def _control(
    table: SharedTable,
    writer: SelectorWriter,
    low: tuple[int, int],
    full: tuple[int, int],
    running_requests: int = RUNNING_ANY,
) -> None:
    """Ask for low budgets, and full ones in calm steps; both ranks count when they follow."""
    generation = writer.write(*low, CalmBudgets(*full, running_requests))
    writer.beat(time.monotonic_ns())

    def followed() -> bool:
        ranks = table.worker_counters()
        seen = {(one.acknowledged_source, one.acknowledged_generation) for one in ranks}
        return len(ranks) == 2 and seen == {(source_code("controller"), generation)}

    wait_until(followed, "both ranks follow the controller")


def _steps(record: Path, rank: int) -> list[Step]:
    with (record / f"rank{rank}.csv").open() as file:
        return [
            Step(
                int(row["step"]),
                row["source"],
                row["phase"],
                (int(row["prefill_budget"]), int(row["decode_budget"])),
                int(row["num_tokens"]),
            )
            for row in csv.DictReader(file)
        ]


def _tokens(steps: list[Step], phase: str, budgets: tuple[int, int] | None = None) -> int:
    return sum(
        one.num_tokens
        for one in steps
        if one.phase == phase and (budgets is None or one.budgets == budgets)
    )


def test_a_request_that_nobody_waits_behind_is_served_at_the_calm_budgets_bit_for_bit(
    story: Story,
) -> None:
    assert story.alone == story.at_full
    assert story.at_low.prompt_logprobs != story.at_full.prompt_logprobs
    assert {one.phase for one in story.steps_alone} == set(PHASES)
    assert {one.budgets for one in story.steps_alone} == {story.full}
    assert {one.source for one in story.steps_alone} == {"controller"}


def test_steps_behind_which_requests_wait_have_the_lower_budgets(story: Story) -> None:
    assert [len(one.tokens) for one in story.burst] == [NEW_TOKENS] * len(BURST)
    assert {one.budgets for one in story.steps_of_burst} == {story.low, story.full}
    for phase in PHASES:
        assert _tokens(story.steps_of_burst, phase, story.low) > 0
    assert _tokens(story.steps_of_burst, "decode", story.full) > 0  # the last two of ten
    last = story.steps_of_burst[-1]
    assert (last.phase, last.budgets) == ("decode", story.full)


def test_steps_of_too_many_running_requests_have_the_lower_budgets(story: Story) -> None:
    decodes = [one for one in story.steps_of_pair if one.phase == "decode"]
    assert {(one.num_tokens, one.budgets) for one in decodes} == {(1, story.full), (2, story.low)}
    prefills = [one for one in story.steps_of_pair if one.phase == "prefill"]
    assert {one.budgets for one in prefills} == {story.full}  # none or one was running


def test_every_rank_decides_the_same_about_every_step(story: Story) -> None:
    first, second = story.by_rank
    assert first == second
    assert len(first) > 3 * NEW_TOKENS


def test_the_table_counts_the_tokens_of_calm_steps(story: Story) -> None:
    counted, steps = story.counted_in_burst, story.steps_of_burst
    assert counted.prefill == _tokens(steps, "prefill") == sum(map(len, BURST))
    assert counted.decode == _tokens(steps, "decode")
    assert counted.calm_prefill == _tokens(steps, "prefill", story.full)
    assert counted.calm_decode == _tokens(steps, "decode", story.full)
    assert 0 < counted.calm_decode < counted.decode


@pytest.mark.parametrize("phase", PHASES)
def test_the_metrics_tell_the_calm_budgets_and_both_counts(story: Story, phase: str) -> None:
    shown = dict(
        line.rsplit(" ", 1)
        for line in story.metrics.splitlines()
        if line.startswith("sglang_alloc_") and f'phase="{phase}"' in line
    )
    budget = [float(v) for k, v in shown.items() if k.startswith("sglang_alloc_calm_budget")]
    assert budget == [story.full[0]]
    for calm in ("yes", "no"):
        (count,) = (
            float(value)
            for name, value in shown.items()
            if name.startswith("sglang_alloc_tokens_total") and f'calm="{calm}"' in name
        )
        assert count > 0
