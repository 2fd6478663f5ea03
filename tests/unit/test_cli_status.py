"""`sglang-alloc status`: one look, JSON, and a view that survives what happens to the table."""

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from table_factory import publish_and_open
from typer.testing import CliRunner

from sglang_alloc.cli import app
from sglang_alloc.errors import SharedTableError
from sglang_alloc.shared_table import (
    CalmBudgets,
    CalmTokens,
    SelectorWriter,
    SharedTable,
    WorkerCounters,
)
from sglang_alloc.status_view import TableFollower, render, watch
from sglang_alloc.table_status import table_status

NOW_NS = 1_000 * 10**9
NO_PROCESS = 2**22 + 1


def _counters(rank: int = 0, tokens: int = 100, pid: int | None = None) -> WorkerCounters:
    return WorkerCounters(
        pid=pid or os.getpid(),
        rank=rank,
        acknowledged_generation=2,
        acknowledged_source=1,
        prefill_budget=8,
        decode_budget=6,
        steps=50,
        fallbacks=3,
        sampled_prefill_tokens=tokens,
        sampled_prefill_activations=8 * tokens,
        sampled_decode_tokens=tokens,
        sampled_decode_activations=6 * tokens,
        sampled_decode_steps=10,
        distinct_experts=120,
        last_step_ns=NOW_NS - 2 * 10**9,
        kept_mass_millionths=970_000,
    )


def _steer(table: SharedTable, heartbeat_ns: int = NOW_NS - 10**9) -> None:
    with SelectorWriter.acquire(table) as writer:
        writer.write(8, 6)
        writer.beat(heartbeat_ns)


def _text(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_one_look_shows_what_is_wanted_in_force_and_measured(table: SharedTable) -> None:
    _steer(table)
    table.set_override(5, 4, NOW_NS + 90 * 10**9, "ana")
    table.worker_slot(0).store(_counters())
    text = _text(render(table_status(table, NOW_NS)))
    lines = [" ".join(line.strip("│ \n").split()) for line in text.splitlines()]
    assert "full quality 12 12" in lines
    assert "controller wants 8 (67%) 6 (50%) generation 2" in lines
    assert "override wants 5 (42%) 4 (33%) by ana, 1 min 30 s left" in lines
    assert "measured 8.0 6.0" in lines
    assert "97.0% of router weight kept, 4.0 distinct experts per layer and decode step" in lines
    assert "0 controller 2 8 6 50 3 2.0 s ago" in lines
    assert f"controller: pid {os.getpid()}, epoch 1, heartbeat 1.0 s ago" in lines
    assert max(map(len, text.splitlines())) <= 80


def test_a_new_table_says_that_nobody_has_taken_it(table: SharedTable) -> None:
    text = _text(render(table_status(table, NOW_NS)))
    assert "no server has taken this table yet" in text
    assert "controller: none has written yet" in text


def test_a_name_with_brackets_is_shown_as_it_is(tmp_path: Path) -> None:
    table = publish_and_open(tmp_path / "odd.tbl", model_id="[red]odd[/]")
    assert "[red]odd[/]" in _text(render(table_status(table, NOW_NS)))


def test_a_rank_is_gone_when_its_process_is_and_it_steps_no_more(table: SharedTable) -> None:
    table.worker_slot(0).store(_counters(pid=NO_PROCESS))
    assert table_status(table, NOW_NS).workers[0].alive
    assert not table_status(table, NOW_NS + 60 * 10**9).workers[0].alive
    assert "gone" in _text(render(table_status(table, NOW_NS + 60 * 10**9)))


def test_means_are_since_the_earlier_counters_of_the_same_run(table: SharedTable) -> None:
    now = _counters(tokens=200)._replace(sampled_decode_activations=6 * 100 + 4 * 100)
    table.worker_slot(0).store(now)
    since = table_status(table, NOW_NS, {0: _counters()}).workers[0]
    assert since.decode_activations_per_token == 4.0
    assert since.distinct_experts_per_layer is None
    other_run = table_status(table, NOW_NS, {0: _counters(pid=1)}).workers[0]
    assert other_run.decode_activations_per_token == 5.0


def test_the_json_has_every_number_and_no_heartbeat_is_null(table: SharedTable) -> None:
    table.worker_slot(1).store(_counters(rank=1))
    result = CliRunner().invoke(app, ["status", "--json", "--shared-path", str(table.path)])
    looked = json.loads(result.stdout)
    assert (looked["prefill_budget"], looked["budget_max"], looked["generation"]) == (12, 12, 1)
    assert (looked["heartbeat_age_seconds"], looked["override"]) == (None, None)
    assert looked["publication_id"] == table.publication_id
    (worker,) = looked["workers"]
    assert (worker["rank"], worker["source"], worker["fallbacks"]) == (1, "controller", 3)


@pytest.mark.parametrize("option", [[], ["--once"]])
def test_without_a_terminal_one_look_is_printed(table: SharedTable, option: list[str]) -> None:
    result = CliRunner().invoke(app, ["status", "--shared-path", str(table.path), *option])
    assert result.exit_code == 0
    assert "tiny-moe" in result.stdout


@pytest.mark.parametrize("option", ["--once", "--json"])
def test_one_look_at_a_missing_table_is_an_error(tmp_path: Path, option: str) -> None:
    path = str(tmp_path / "absent.tbl")
    result = CliRunner().invoke(app, ["status", option, "--shared-path", path])
    assert isinstance(result.exception, SharedTableError)


def test_the_live_view_follows_a_table_that_comes_changes_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "tiny.tbl"
    follower = TableFollower(path)
    assert "waiting for a shared table" in _text(follower.look(NOW_NS))
    publish_and_open(path)
    assert "tiny-moe" in _text(follower.look(NOW_NS))
    publish_and_open(path, model_id="another-moe")
    assert "another-moe" in _text(follower.look(NOW_NS))
    path.write_bytes(b"x" * 5000)
    assert "waiting" in _text(follower.look(NOW_NS))
    path.unlink()
    assert "There is no shared table" in _text(follower.look(NOW_NS))
    follower.close()


def test_the_live_view_measures_over_the_last_ten_seconds(table: SharedTable) -> None:
    follower = TableFollower(table.path)
    slot = table.worker_slot(0)
    slot.store(_counters())
    follower.look(NOW_NS)
    slot.store(_counters(tokens=200)._replace(sampled_decode_activations=6 * 100 + 2 * 100))
    assert " 2.0 " in _text(follower.look(NOW_NS + 5 * 10**9))
    slot.store(_counters(tokens=300)._replace(sampled_decode_activations=6 * 100 + 7 * 100))
    assert " 5.0 " in _text(follower.look(NOW_NS + 14 * 10**9))
    follower.close()


def test_the_live_view_ends_quietly_when_interrupted(table: SharedTable) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    watch(table.path, 0.5, console=console, sleep=sleep)
    assert waited == [0.5, 0.5, 0.5]
    assert isinstance(console.file, io.StringIO)
    assert "tiny-moe" in console.file.getvalue()


def test_the_heartbeat_s_age_is_of_this_machine_s_monotonic_clock(table: SharedTable) -> None:
    _steer(table, heartbeat_ns=time.monotonic_ns())
    age_seconds = table_status(table, time.monotonic_ns()).heartbeat_age_seconds
    assert age_seconds is not None
    assert 0 <= age_seconds < 60


@pytest.mark.parametrize(
    ("calm", "when"),
    [(CalmBudgets(12, 9), "none waits"), (CalmBudgets(12, 9, 14), "none waits, 13 run at most")],
)
def test_calm_budgets_and_the_share_of_tokens_of_calm_steps_are_shown(
    table: SharedTable, calm: CalmBudgets, when: str
) -> None:
    with SelectorWriter.acquire(table) as writer:
        writer.write(8, 6, calm)
    table.worker_slot(0).store(_counters(), CalmTokens(970, 1000, 3, 4))
    text = _text(render(table_status(table, NOW_NS)))
    lines = [" ".join(line.strip("│ \n").split()) for line in text.splitlines()]
    assert "controller wants 8 (67%) 6 (50%) generation 2" in lines
    assert f"in calm steps 12 (100%) 9 (75%) {when}" in lines
    assert "tokens of calm steps 97.0% 75.0% since the start" in lines
    assert max(map(len, text.splitlines())) <= 80


def test_without_calm_budgets_and_counted_tokens_none_are_shown(table: SharedTable) -> None:
    _steer(table)
    table.worker_slot(0).store(_counters())
    looked = table_status(table, NOW_NS)
    assert (looked.calm_prefill_budget, looked.calm_decode_budget) == (None, None)
    assert looked.workers[0].calm_prefill_ratio is None
    assert looked.workers[0].calm_decode_ratio is None
    assert "calm steps" not in _text(render(looked))
