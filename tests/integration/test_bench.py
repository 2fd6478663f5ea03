"""The bench of a real server on the CPU: a cost model comes out, with and without stock beside."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_alloc.cli import app
from sglang_alloc_controller.bench_csv import read_step_times

pytestmark = pytest.mark.server

SMALL = (
    *("--rounds", "1", "--budget", "13", "--decode-batches", "1,2", "--prefill-batches", "1"),
    *("--prompt-tokens", "64", "--decode-steps", "16"),
)
THEIRS = ("--skip-server-warmup", "--max-running-requests", "4")


@pytest.mark.parametrize("stock", [True, False])
def test_a_server_with_arguments_of_ones_own_is_measured(stock: bool, tmp_path: Path) -> None:
    beside = () if stock else ("--no-stock",)
    command = ["bench", *SMALL, *beside, "-o", str(tmp_path), "--", *THEIRS]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    times = read_step_times(tmp_path / "latency.csv")
    assert (times.prefill.sizes, times.decode.sizes) == ((64.0,), (1.0, 2.0))
    assert times.decode.budgets == (13, 40)
    with (tmp_path / "latency.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(row["server_arguments"].endswith(" ".join(THEIRS)) for row in rows)
    assert all(bool(row["ratio_to_stock"]) is stock for row in rows)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert logs.keys() == ({"plugin.log", "stock.log"} if stock else {"plugin.log"})
    assert "max_running_requests=4" in logs["plugin.log"]


def test_a_batch_that_this_server_would_queue_ends_the_bench(tmp_path: Path) -> None:
    command = ["bench", *SMALL, "--no-stock", "-o", str(tmp_path), "--", "--skip-server-warmup"]
    result = CliRunner().invoke(app, [*command, "--max-running-requests", "1"])
    assert "this server runs 1 at once" in str(result.exception)
    assert not (tmp_path / "latency.csv").exists()
