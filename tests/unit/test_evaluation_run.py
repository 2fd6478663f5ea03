"""A whole evaluation of a tiny model: resumable, and each statement computed from its points."""

import csv
import errno
import io
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_factory import make_point, make_subject, make_tables, write_model
from reference_factory import make_model, make_windows
from rich.console import Console
from typer.testing import CliRunner

from sglang_alloc.budget_tables import save_budget_tables
from sglang_alloc.cli import app
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.evaluation import run
from sglang_alloc.evaluation.findings import (
    best_rival,
    compare,
    rank_correlation,
    union_findings,
)
from sglang_alloc.evaluation.intervals import at_usage, mean_interval
from sglang_alloc.evaluation.journal import EvaluationJournal
from sglang_alloc.evaluation.material import Sizes
from sglang_alloc.evaluation.neighbours import STEP_RULES, Crowd, dependence
from sglang_alloc.evaluation.points import Point
from sglang_alloc.evaluation.rules import BASELINES, CORRECTED
from sglang_alloc.evaluation.run import JOURNAL_NAME, Evaluation, evaluate

TINY = Sizes(
    windows=32, window_tokens=40, prompts=4, prompt_tokens=24, new_tokens=4, questions=6,
    neighbour_requests=1, calibration_windows=4, calibration_tokens=48,
)  # fmt: skip


def _console() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, bytes]:
    """An evaluation that was killed while it wrote its sixth point, and the journal it left."""
    folder = write_model(tmp_path_factory.mktemp("model"))
    asked = Evaluation(
        folder, folder / "budget_tables.npz", folder / "out", TINY, fractions=(0.5, 0.75)
    )
    child = multiprocessing.get_context("spawn").Process(target=_evaluate_until_killed, args=asked)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    return asked, (asked.output / JOURNAL_NAME).read_bytes()


def _evaluate_until_killed(*asked: Any) -> None:
    torch.set_num_threads(1)

    class Journal(EvaluationJournal):
        def add(self, point: Point) -> None:
            if len(self.points) == 5:
                with (Evaluation(*asked).output / JOURNAL_NAME).open("ab") as file:
                    file.write(json.dumps(point.to_json()).encode()[:40])
                os.kill(os.getpid(), signal.SIGKILL)
            super().add(point)

    run.EvaluationJournal = Journal  # type: ignore[misc]
    evaluate(Evaluation(*asked), _console())


@pytest.fixture(scope="module")
def evaluated(killed: tuple[Evaluation, bytes]) -> Evaluation:
    asked, _ = killed
    assert evaluate(asked, _console()) == asked.output / "QUALITY.md"
    return asked


def test_a_killed_evaluation_goes_on_from_its_last_whole_point(
    killed: tuple[Evaluation, bytes], evaluated: Evaluation
) -> None:
    left = killed[1].splitlines(keepends=True)
    found = (evaluated.output / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    assert len(left) == 1 + 5 + 1
    assert found[:6] == left[:6]
    names = [(point["rule"], point["budget"]) for point in map(json.loads, found[1:])]
    assert len(names) == len(set(names)) > 100


def test_an_evaluation_writes_a_report_plots_and_all_points(evaluated: Evaluation) -> None:
    text = (evaluated.output / "QUALITY.md").read_text()
    for heading in ("Loss above full", "baselines", "Generation", "Decode", "Predicted",
                    "mid-sequence", "neighbours"):  # fmt: skip
        assert heading in text
    for plot in ("quality.png", "pareto.png", "union.png"):
        assert (evaluated.output / plot).read_bytes().startswith(b"\x89PNG")
    with (evaluated.output / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    grid = {(row["rule"], row["budget"]) for row in rows}
    assert all((name, budget) in grid for name in (*BASELINES, *CORRECTED) for budget in "46")
    full = next(row for row in rows if row["rule"] == "full")
    assert (full["nll_above_full"], full["agreement"]) == ("0.00000", "1.00000")


def test_a_finished_evaluation_measures_nothing_again(evaluated: Evaluation) -> None:
    journal = evaluated.output / JOURNAL_NAME
    before = journal.read_bytes()
    evaluate(evaluated, _console())
    assert journal.read_bytes() == before


def test_a_close_comparison_measures_its_rivals_losses_alone(
    evaluated: Evaluation, tmp_path: Path
) -> None:
    asked = evaluated._replace(output=tmp_path, rivals=("Alloc-T",), fractions=(0.5,))
    text = evaluate(asked, _console()).read_text()
    points = EvaluationJournal(tmp_path / JOURNAL_NAME, run.identity_of(asked)).points
    assert set(points) == {("full", 8), ("threshold", 4), ("Alloc-T", 4)}
    assert "| Alloc-T |" in text
    assert "mid-sequence" not in text


def test_an_unknown_rival_is_refused(evaluated: Evaluation) -> None:
    with pytest.raises(ConfigurationError, match=r"'Alloc'.*Alloc-L"):
        evaluate(evaluated._replace(rivals=("Alloc",)), _console())


def test_points_of_another_size_are_refused(evaluated: Evaluation) -> None:
    with pytest.raises(ConfigurationError, match="sizes"):
        evaluate(evaluated._replace(sizes=TINY._replace(questions=5)), _console())


def test_tables_of_another_model_are_refused(evaluated: Evaluation, tmp_path: Path) -> None:
    foreign = make_tables(make_model("olmoe"))
    save_budget_tables(tmp_path / "foreign.npz", foreign)
    with pytest.raises(ConfigurationError, match="another model"):
        evaluate(evaluated._replace(tables=tmp_path / "foreign.npz"), _console())


def test_a_model_that_is_no_reference_model_is_sent_to_its_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path)])
    assert "evaluate-served" in str(result.exception)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, ConfigurationError)
    assert f"{tmp_path / 'config.json'} " in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_is_refused(evaluated: Evaluation, tmp_path: Path) -> None:
    for name in ("config.json", "budget_tables.npz"):
        (tmp_path / name).write_bytes((evaluated.folder / name).read_bytes())
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, ConfigurationError)
    assert "model.safetensors" in str(result.exception)


def test_an_interrupted_evaluation_says_what_it_kept(
    evaluated: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_jobs(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_jobs", run_jobs)
    command = ["evaluate", str(evaluated.folder), "-o", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 130
    assert f"is in {tmp_path / JOURNAL_NAME}; the same command goes on" in result.stderr


def test_a_number_of_windows_without_whole_batches_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--windows", "40"])
    assert "multiple of 32" in str(result.exception)


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text("hello\n")
    with pytest.raises(ConfigurationError, match="hello"):
        EvaluationJournal(path, {})


def test_a_full_disk_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    journal = EvaluationJournal(path, {})
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(ConfigurationError, match=r"No space left.*run the same command again"):
        journal.add(make_point("layer", 4, 2.0, [1.0]))
    assert not journal.points


def test_a_report_that_finds_the_disk_full_leaves_the_one_before(
    evaluated: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in evaluated.output.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match="No space left"):
        evaluate(evaluated, _console())
    assert {path.name: path.read_bytes() for path in evaluated.output.iterdir()} == before


def test_interval_of_the_mean_covers_it_and_shrinks_with_the_sample() -> None:
    noise = np.random.default_rng(1).normal(1.0, 1.0, 400)
    few, many = mean_interval(noise[:50]), mean_interval(noise)
    assert few.low < few.mean < few.high
    assert many.high - many.low < few.high - few.low
    assert many.excludes_zero
    assert not mean_interval(noise - noise.mean()).excludes_zero


def test_losses_are_interpolated_geometrically_in_use() -> None:
    samples = [[0.8, 1.6], [0.2, 0.4]]
    assert at_usage([2.0, 4.0], samples, 3.0).mean() == pytest.approx((1.2 * 0.3) ** 0.5)
    assert at_usage([4.0, 2.0], samples[::-1], 2.0).tolist() == samples[0]
    assert at_usage([2.0, 4.0], samples, 9.0).tolist() == samples[1]
    assert at_usage([2.0, 4.0], [[0.2, 0.2], [0.0, 0.0]], 3.0).tolist() == [0.1, 0.1]


def _points():
    made = [make_point("full", 8, 4.0, [1.0, 2.0, 1.5])]
    made.append(make_point("threshold", 4, 2.0, [1.1, 2.1, 1.6]))
    for rule in (*BASELINES, *CORRECTED):
        made.append(make_point(rule, 4, 2.0, [1.3, 2.3, 1.8]))
        made.append(make_point(rule, 6, 3.0, [1.2, 2.2, 1.7]))
    made.append(make_point("top-p", 4, 2.0, [1.2, 2.2, 1.7]))
    return {(point.rule, point.budget): point for point in made}


def test_comparison_is_paired_and_at_the_defaults_measured_mean_k() -> None:
    points = _points()
    found = compare(points, 4, "uniform k")
    assert found.difference.mean == pytest.approx(-0.2)
    assert found.difference.low == pytest.approx(found.difference.high)  # the same in each window
    moved = points | {("threshold", 4): points["threshold", 4]._replace(mean_k=3.0)}
    assert compare(moved, 4, "uniform k").difference.mean == pytest.approx(-0.1)


def test_best_rival_is_the_baseline_of_least_loss() -> None:
    found = best_rival(_points(), 4)
    assert (found.rival, found.rival_loss) == ("top-p", pytest.approx(0.2))


def test_union_is_compared_at_equal_distinct_experts() -> None:
    points = _points()
    for point in (
        make_point("text: uniform k", 2, 1.0, [1.8, 2.8, 2.3]),
        make_point("text: uniform k", 4, 2.0, [1.4, 2.4, 1.9]),
        make_point("union of 8", 4, 2.0, [1.2, 2.2, 1.7]),
    ):
        points[point.rule, point.budget] = point
    (found,) = union_findings(points, [8])
    assert found.distinct_experts == 4.0
    assert found.ratio == pytest.approx(0.5)


def test_rank_correlation_looks_at_the_order_alone() -> None:
    assert rank_correlation([1, 2, 3], [0.1, 5, 900]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)


@pytest.mark.parametrize("name", ["layer", "threshold"])
def test_a_request_does_not_depend_on_its_neighbours_under_a_rule_by_token(name: str) -> None:
    found = _dependence(name)
    assert found["logit"].max() < 1e-9
    assert found["changed"].max() == found["unlike"].max() == 0.0


@pytest.mark.parametrize("name", ["token", "union"])
def test_a_request_depends_on_its_neighbours_under_a_rule_by_step(name: str) -> None:
    assert _dependence(name)["logit"].max() > 1e-3


def _dependence(name: str) -> dict[str, torch.Tensor]:
    with make_subject() as subject:
        rule = STEP_RULES[name](subject, 4)
        return dependence(Crowd(subject.model.double(), make_windows(32, 20), 3), rule)
