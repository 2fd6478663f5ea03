"""lm-evaluation-harness at a fixed budget: what is held, what is refused, what is read."""

from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from completion_server import StandInServer
from table_factory import publish_and_open
from typer.testing import CliRunner
from waiting import wait_until

from sglang_alloc.cli import app
from sglang_alloc.evaluation import harness
from sglang_alloc.evaluation.harness import HarnessError, HarnessRun, Measured, run_harness
from sglang_alloc.evaluation.harness_results import Score, read_scores, summary, write_scores
from sglang_alloc.shared_table import SharedTable, WorkerCounters

RESULTS = {
    "results": {
        "arc": {
            "alias": "arc",
            "acc,none": 0.25,
            "acc_stderr,none": 0.05,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
        }
    }
}


@pytest.fixture
def table(tmp_path: Path) -> Iterator[SharedTable]:
    with publish_and_open(tmp_path / "t.tbl") as opened:
        opened.worker_slot(0).store(WorkerCounters(pid=1))
        yield opened


class Engine(threading.Thread):
    """Acknowledges what the table asks for, as the leading rank does, until told to stop."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._path, self._stop_asked = path, threading.Event()
        self.tokens = 0
        self.tells_changes_only = False
        """As a real server, which writes its counters twice a second while it computes."""

    def run(self) -> None:
        with SharedTable.open(self._path) as table:
            told = 0
            while not self._stop_asked.wait(0.002):
                override = table.override(time.monotonic_ns())
                if override is None:
                    continue
                self.tokens += 10
                if self.tells_changes_only and override.generation == told:
                    continue
                told = override.generation
                table.worker_slot(0).store(
                    WorkerCounters(
                        pid=1,
                        acknowledged_source=2,
                        acknowledged_generation=override.generation,
                        prefill_budget=override.prefill_budget,
                        decode_budget=override.decode_budget,
                        sampled_prefill_tokens=self.tokens,
                        sampled_prefill_activations=self.tokens * override.prefill_budget,
                    )
                )

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()


@pytest.fixture
def engine(table: SharedTable) -> Iterator[Engine]:
    running = Engine(table.path)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def server() -> Iterator[StandInServer]:
    with StandInServer() as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "LOOK_EVERY_SECONDS", 0.02)


def _program(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "lm_eval"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(harness, "find_harness", lambda: str(path))


def _run(server: StandInServer, table: SharedTable, folder: Path, budget: int = 6) -> Measured:
    return run_harness(HarnessRun(server.url, table.path, budget, "model", folder / "out", ()))


@pytest.mark.usefixtures("engine")
def test_the_budget_holds_while_the_harness_runs_and_ends_with_it(
    server: StandInServer, table: SharedTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RENEW_SECONDS", 0.05)
    _program(tmp_path, f'echo "$@" > {tmp_path}/asked; sleep 0.5', monkeypatch)
    measured = _run(server, table, tmp_path)
    assert measured == Measured(prefill=6.0, decode=None)
    assert table.override(time.monotonic_ns()) is None
    assert server.paths == ["/flush_cache"]
    asked = (tmp_path / "asked").read_text()
    assert f"base_url={server.url}/v1/completions" in asked
    assert f"--output_path {tmp_path}/out" in asked
    generation = table.worker_counters()[0].acknowledged_generation
    assert generation > 2  # renewed, so that it would soon have ended by itself


def test_what_a_quick_run_has_kept_is_told_although_the_server_is_idle_again(
    engine: Engine,
    server: StandInServer,
    table: SharedTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.tells_changes_only = True
    _program(tmp_path, "sleep 0.05", monkeypatch)
    assert _run(server, table, tmp_path) == Measured(prefill=6.0, decode=None)


@pytest.mark.usefixtures("engine")
def test_an_override_by_somebody_else_ends_the_run(
    server: StandInServer, table: SharedTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    _program(tmp_path, f"touch {runs}; exec sleep 60", monkeypatch)

    def interfere() -> None:
        wait_until(runs.exists, "the harness runs")
        table.set_override(9, 9, time.monotonic_ns() + 60 * 10**9, "somebody")

    thread = threading.Thread(target=interfere)
    thread.start()
    with pytest.raises(HarnessError, match="stopped obeying budget 6"):
        _run(server, table, tmp_path)
    thread.join()
    override = table.override(time.monotonic_ns())
    assert override is not None
    assert override.actor == "somebody"


@pytest.mark.usefixtures("engine")
def test_a_harness_that_fails_is_passed_on(
    server: StandInServer, table: SharedTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path, "exit 3", monkeypatch)
    with pytest.raises(HarnessError, match="exit status 3"):
        _run(server, table, tmp_path)
    assert table.override(time.monotonic_ns()) is None


def test_a_person_s_override_is_respected(
    server: StandInServer, table: SharedTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path, "exit 0", monkeypatch)
    table.set_override(5, 5, time.monotonic_ns() + 60 * 10**9, "ann")
    with pytest.raises(HarnessError, match="ann has set the budget by hand"):
        _run(server, table, tmp_path)
    override = table.override(time.monotonic_ns())
    assert override is not None
    assert override.actor == "ann"


@pytest.mark.parametrize("budget", [2, 13])
def test_a_budget_outside_the_table_is_refused(
    server: StandInServer,
    table: SharedTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    budget: int,
) -> None:
    _program(tmp_path, "exit 0", monkeypatch)
    with pytest.raises(HarnessError, match="has budgets 3 to 12"):
        _run(server, table, tmp_path, budget)


def test_a_server_that_does_not_answer_is_named(
    table: SharedTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path, "exit 0", monkeypatch)
    asked = HarnessRun("http://127.0.0.1:9", table.path, 6, "model", tmp_path, ())
    with pytest.raises(HarnessError, match="was not ready"):
        run_harness(asked)


def test_a_missing_harness_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sglang_alloc.evaluation.harness.sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HarnessError, match=r"pip install '\.\[evaluate\]'"):
        harness.find_harness()


def test_the_newest_results_are_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "results_1.json").write_text(json.dumps({"results": {}}))
    newest = tmp_path / "model" / "results_2.json"
    newest.write_text(json.dumps(RESULTS))
    expected = [
        Score("arc", "none", "acc", 0.25, 0.05),
        Score("arc", "none", "acc_norm", 0.5, None),
    ]
    assert read_scores(tmp_path) == expected


@pytest.mark.parametrize("content", [None, "half", "[]", '{"results": 3}'])
def test_results_that_are_none_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results_1.json").write_text(content)
    with pytest.raises(HarnessError, match="results_"):
        read_scores(tmp_path)


def test_scores_are_written_with_what_was_kept(tmp_path: Path) -> None:
    scores = [Score("arc", "none", "acc", 0.25, 0.05)]
    write_scores(tmp_path / "scores.csv", [(6, Measured(5.9871, None), scores)])
    with (tmp_path / "scores.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["budget"], row["prefill_activations"], row["decode_activations"]) == (
        *("6", "5.987"),
        "",
    )
    assert (row["metric"], row["value"], row["standard_error"]) == ("acc", "0.25", "0.05")
    assert summary(6, Measured(5.9871, None), scores) == (
        "budget 6 (prefill 5.99 activations per token): arc acc 0.2500 ± 0.0500"
    )


@pytest.mark.parametrize(
    ("finished", "said"), [(0, "nothing was kept"), (1, "scores.csv has the budgets before it")]
)
def test_an_interruption_says_which_scores_were_kept(
    table: SharedTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int, said: str
) -> None:
    runs: list[HarnessRun] = []

    def run(asked: HarnessRun) -> Measured:
        runs.append(asked)
        if len(runs) > finished:
            raise KeyboardInterrupt
        asked.output.mkdir(parents=True)
        (asked.output / "results_1.json").write_text(json.dumps(RESULTS))
        return Measured(None, None)

    monkeypatch.setattr(harness, "run_harness", run)
    budgets = ("--budget", "full", "--budget", "6")
    command = ["evaluate-served", "http://127.0.0.1:9", "--table", str(table.path), *budgets]
    result = CliRunner().invoke(app, [*command, "--tokenizer", "m", "-o", str(tmp_path / "out")])
    assert result.exit_code == 130
    assert f"budget {runs[-1].budget} was released unfinished" in result.stderr
    assert said in result.stderr
    assert (tmp_path / "out" / "scores.csv").exists() is (finished > 0)
