"""What the demo watches beside the load: gauges, budgets in force, and its own progress."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console
from streaming_server import streaming_server
from table_factory import publish_and_open

from sglang_alloc.demo.heldout_loss import cut_windows
from sglang_alloc.demo.observation import calm_in_force, observe_run, sum_loads
from sglang_alloc.demo.trace import LoadPhase, Trace, TracedRequest
from sglang_alloc.server_runs.budget_override import BudgetOverride
from sglang_alloc.server_runs.errors import ServerRunError
from sglang_alloc.server_runs.machine import (
    cpu_model,
    machine_facts,
    software_versions,
    system_name,
)
from sglang_alloc.server_runs.progress import Stage, StageProgress, time_left_text
from sglang_alloc.server_runs.served_steps import record_of_leading_rank
from sglang_alloc.shared_table import (
    CalmBudgets,
    Selection,
    SelectorWriter,
    SharedTable,
    WorkerCounters,
)
from sglang_alloc.shared_table_words import source_code
from sglang_alloc.step_record import StepRecord

LOADS = {
    "timestamp": "2026-01-01T00:00:00Z",
    "loads": [
        {"dp_rank": 0, "num_running_reqs": 3, "num_waiting_reqs": 7},
        {"dp_rank": 1, "num_running_reqs": 2, "num_waiting_reqs": 0},
    ],
}


def _acknowledge_override(table: SharedTable) -> None:
    override = table.override(time.monotonic_ns())
    assert override is not None
    table.worker_slot(0).store(
        WorkerCounters(pid=1, acknowledged_source=2, acknowledged_generation=override.generation)
    )


def _acknowledge(table: SharedTable, prefill_budget: int, decode_budget: int) -> None:
    counters = WorkerCounters(pid=1, prefill_budget=prefill_budget, decode_budget=decode_budget)
    table.worker_slot(0).store(counters)


def test_the_loads_of_all_ranks_are_added_up() -> None:
    assert sum_loads(2.0, LOADS) == (2.0, 7.0, 5.0)


def test_a_server_whose_ranks_published_nothing_yet_counts_zero() -> None:
    assert sum_loads(0.0, {"loads": []}) == (0.0, 0.0, 0.0)


def test_a_run_records_requests_the_acknowledged_budgets_and_the_steps(tmp_path: Path) -> None:
    table = publish_and_open(tmp_path / "t.tbl")
    _acknowledge(table, 12, 11)
    request = TracedRequest(0, "calm", 0.0, "normal words", 4)
    ticks: list[tuple[int, int]] = []
    record = StepRecord(tmp_path, 0)
    low, begun_ns = Selection("controller", 3, 9, 7), time.monotonic_ns()
    record.add(1, low, "decode", 2, begun_ns)  # before the run

    def on_tick(_: float, sent: int, done: int) -> None:
        record.add(2, low, "decode", 5, begun_ns + int(1e9), is_calm=True)
        ticks.append((sent, done))

    with streaming_server() as url:
        trace = Trace((LoadPhase("calm", 0.1, 1.0),), (request,))
        run = observe_run(url, trace, table, record_of_leading_rank(tmp_path), on_tick)
    table.close()
    record.close()
    assert [record.error for record in run.requests] == [None]
    assert [entry[1:] for entry in run.budgets] == [(12, 11)]
    assert [entry[1:] for entry in run.calm_budgets] == [(12, 11)]
    assert ticks[-1] == (1, 1)
    assert {step[1:] for step in run.steps} == {("decode", 7, 5, True)}
    assert 0.5 < run.steps[0].begun_seconds <= 1.0  # after the start of the run
    assert run.gauges == ()  # the stand-in has no /v1/loads: a gap, not an error


def test_the_budgets_of_calm_steps_are_those_of_the_generation_that_a_rank_follows(
    tmp_path: Path,
) -> None:
    table = publish_and_open(tmp_path / "t.tbl")
    writer = SelectorWriter.acquire(table)
    generation = writer.write(6, 5, CalmBudgets(11, 10))
    controller, override = source_code("controller"), source_code("override")

    def in_force(source: int, generation: int) -> tuple[int, int] | None:
        rank = WorkerCounters(pid=1, acknowledged_source=source, acknowledged_generation=generation)
        return calm_in_force(table, rank)

    assert in_force(controller, generation) == (11, 10)
    assert in_force(controller, generation - 1) is None
    assert in_force(override, generation) is None
    generation = writer.write(7, 5)
    assert in_force(controller, generation) is None
    table.close()


def test_an_override_returns_when_the_server_has_acknowledged_it(tmp_path: Path) -> None:
    table = publish_and_open(tmp_path / "t.tbl")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        _acknowledge_override(table)

    BudgetOverride(table, sleep=sleep).set(5, 6)
    assert len(waits) == 1
    BudgetOverride(table, sleep=sleep).set(5, 6)  # the same budgets again are a new override
    assert len(waits) == 2
    table.close()


def test_an_override_that_nobody_acknowledges_is_an_error(tmp_path: Path) -> None:
    table = publish_and_open(tmp_path / "t.tbl")
    times = iter(float(second) for second in range(0, 1000, 5))
    override = BudgetOverride(table, sleep=lambda _: None, clock=lambda: next(times))
    with pytest.raises(ServerRunError, match="is it served with this table"):
        override.set(5, 6)
    table.close()


def test_windows_are_the_same_each_time_and_of_the_asked_size() -> None:
    texts = ["abcdefghij" * 50]
    windows = cut_windows(texts, 3, 30, 12, seed=1)
    assert windows == cut_windows(texts, 3, 30, 12, seed=1)
    assert all((len(w.prompt), len(w.continuation)) == (30, 12) for w in windows)


def test_time_left_counts_the_stages_to_come() -> None:
    now = [0.0]
    stages = (Stage("start", 30.0), Stage("run", 90.0))
    console = Console(file=io.StringIO())
    progress = StageProgress(stages, console, clock=lambda: now[0])
    with progress.stage("start"):
        now[0] = 10.0
        assert progress.seconds_left() == 110.0
        now[0] = 50.0  # late: about to end
        assert progress.seconds_left() == 90.0
    with progress.stage("run"):
        now[0] = 80.0
        assert progress.seconds_left() == 60.0
    assert progress.seconds_left() == 0.0


def test_without_a_terminal_progress_is_a_line_every_ten_seconds() -> None:
    now = [0.0]
    file = io.StringIO()
    progress = StageProgress((Stage("run", 90.0),), Console(file=file), clock=lambda: now[0])
    with progress.shown(), progress.stage("run"):
        for second in range(31):
            now[0] = float(second)
            progress.note(f"second {second}")
    lines = file.getvalue().splitlines()
    assert lines[0] == "run: started (about 1 min 30 s left)"
    assert lines[1] == "run: second 10 (about 1 min 20 s left)"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "about 0 s left"), (58.0, "about 1 min 00 s left"), (127.0, "about 2 min 05 s left")],
)
def test_time_left_is_told_in_minutes_and_seconds(seconds: float, text: str) -> None:
    assert time_left_text(seconds) == text


def test_the_machine_is_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: A Processor @ 2 GHz\n")
    assert cpu_model(cpuinfo) == "A Processor @ 2 GHz"
    assert cpu_model(tmp_path / "missing")
    assert {"cpu_model", "cores", "memory_gib"} <= set(machine_facts())
    assert "python" in software_versions()


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.12.3", "6.12.3"),
        ("6.1.0-32-amd64", "6.1.0"),
        ("5.15.167.4-microsoft-standard-WSL2", "5.15.167.4"),
        ("rolling", "unknown"),
    ],
)
def test_the_kernel_is_named_by_numbers_without_whose_build_it_is(
    release: str, version: str
) -> None:
    assert system_name("Linux", release, "x86_64") == f"Linux-{version}-x86_64"
