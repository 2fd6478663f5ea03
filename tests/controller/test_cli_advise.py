"""`sglang-alloc-controller advise`: from bench CSVs and tables to a cost model the law can use."""

import csv
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from sglang_alloc.budget_tables import BudgetTables, save_budget_tables
from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.bench_csv import read_step_times
from sglang_alloc_controller.cli import app

HEAD = "phase,concurrency,budget,median_ms,prefill_prompt_tokens,mode"
FULL = 8
# At 32 running requests the union of experts is complete: only a cap on it gains.
THRESHOLD = {"prefill": {100: (50, 100)}, "decode": {1: (5, 10), 32: (38, 40)}}
UNION = {"prefill": {100: (50, 100)}, "decode": {1: (9, 10), 32: (20, 40)}}


def _bench(path: Path, mode: str, times: dict[str, dict[int, tuple[int, int]]]) -> Path:
    rows = [
        f"{phase},{size // 100 if phase == 'prefill' else size},{budget},{ms},100,{mode}"
        for phase, by_size in times.items()
        for size, both in by_size.items()
        for budget, ms in zip((4, FULL), both, strict=True)
    ]
    path.write_text("\n".join([HEAD, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    budgets = np.arange(2, FULL + 1, dtype=np.int32)
    count = len(budgets)
    losses = np.linspace(0.03, 0.0, count, dtype=np.float32)
    path = tmp_path / "tables.npz"
    save_budget_tables(
        path,
        BudgetTables(
            model_id="tiny", fingerprint="0" * 64, num_experts=16, top_k=4,
            layer_ids=np.arange(2, dtype=np.int32), budgets=budgets,
            quotas=np.stack([budgets // 2, budgets - budgets // 2], axis=1).astype(np.int16),
            predicted_loss=2 * losses,
            thresholds=np.zeros((count, 2), np.float32), threshold_predicted_loss=losses,
            union_quotas=np.stack([budgets // 2, budgets - budgets // 2], axis=1).astype(np.int16),
            union_predicted_loss=losses,
        ),
    )  # fmt: skip
    return path


def _advise(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["advise", *map(str, arguments)])


def test_each_batch_size_gets_the_mode_that_saves_most_there(tmp_path: Path, tables: Path) -> None:
    both = (
        _bench(tmp_path / "t.csv", "threshold", THRESHOLD),
        _bench(tmp_path / "u.csv", "union", UNION),
    )
    result = _advise(*both, "--tables", tables, "--batch", 1, "--batch", 32, "--max-loss", 0.021,
                     "--prompt-tokens", 1, "--chunk-tokens", 100)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "1 running: mode threshold saves most" in result.output
    assert "32 running: mode union saves most" in result.output
    assert "decode buys most of it" in result.output


def test_the_cost_model_is_read_back_with_the_same_times(tmp_path: Path, tables: Path) -> None:
    bench = _bench(tmp_path / "t.csv", "threshold", THRESHOLD)
    output = tmp_path / "tables.cost.csv"
    assert _advise(bench, "--tables", tables, "-o", output).exit_code == 0
    read, direct = read_step_times(output), read_step_times(bench)
    assert read.prefill == direct.prefill
    assert read.decode == direct.decode
    rows = list(csv.DictReader(output.read_text(encoding="utf-8").splitlines()))
    assert {row["mode"] for row in rows} == {"threshold"}
    floor = next(row for row in rows if row["phase"] == "decode" and row["concurrency"] == "1")
    assert float(floor["predicted_loss"]) == pytest.approx(0.02)
    # 5 ms saved for 20 thousandths of a nat.
    assert float(floor["ms_saved_per_millinat"]) == pytest.approx(0.25, rel=1e-3)
    assert floor["worth_using"] == "1"


def test_a_bench_of_another_model_is_refused(tmp_path: Path, tables: Path) -> None:
    bench = _bench(tmp_path / "t.csv", "threshold", THRESHOLD)
    bench.write_text(bench.read_text().replace(f",{FULL},", ",9,"), encoding="utf-8")
    result = _advise(bench, "--tables", tables)
    assert result.exit_code == 2
    assert "budgets from 4 to 9" in result.output
    assert "rows from 2 to 8" in result.output


def test_a_mode_that_was_not_measured_is_refused(tmp_path: Path, tables: Path) -> None:
    bench = _bench(tmp_path / "t.csv", "threshold", THRESHOLD)
    result = _advise(bench, "--tables", tables, "--mode", "union")
    assert result.exit_code == 2
    assert "the benches measured threshold" in result.output


def test_two_benches_of_one_mode_are_refused(tmp_path: Path, tables: Path) -> None:
    benches = [_bench(tmp_path / name, "union", UNION) for name in ("a.csv", "b.csv")]
    result = _advise(*benches, "--tables", tables)
    assert result.exit_code == 2
    assert "stands in two benches" in result.output


def test_a_file_of_two_modes_is_no_cost_model(tmp_path: Path) -> None:
    bench = _bench(tmp_path / "t.csv", "threshold", THRESHOLD)
    other = _bench(tmp_path / "u.csv", "union", UNION).read_text().splitlines()[1:]
    bench.write_text(bench.read_text() + "\n".join(other) + "\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="modes threshold, union, and a server serves one"):
        read_step_times(bench)
    assert read_step_times(bench, "union").decode.at(32, 4) == pytest.approx(0.02)


def test_a_cost_model_that_cannot_be_written_says_so(tmp_path: Path, tables: Path) -> None:
    bench = _bench(tmp_path / "t.csv", "threshold", THRESHOLD)
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    result = _advise(bench, "--tables", tables, "-o", blocked / "cost.csv")
    assert result.exit_code == 2
    assert "Cannot write the cost model" in result.output
