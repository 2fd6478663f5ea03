"""The bench of served steps without its servers: which rows it makes, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_bench import __main__ as bench_main
from moe_bench import figure, server_bench
from moe_bench.results import SAME_RUN, Results


class FakeTable:
    """What the server bench asks a shared table: its shape and counters that stand still."""

    shape = SimpleNamespace(budget_max=12, budget_min=2, num_layers=2)

    def worker_counters(self) -> list[SimpleNamespace]:
        names = [f"sampled_{kind}_tokens" for kind in ("decode", "prefill")]
        names += [f"sampled_{kind}_activations" for kind in ("decode", "prefill")]
        return [
            SimpleNamespace(
                **dict.fromkeys([*names, "sampled_decode_steps", "distinct_experts"], 0)
            )
        ]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Stand-ins for servers, whose steps take no time to speak of; returns the modes per round."""
    rounds: list[tuple[str, ...]] = []

    def serve_together(_stack: Any, _model: Any, modes: list[str], *_: Any) -> Any:
        rounds.append(tuple(modes))
        return "stock", [server_bench.Budgeted(mode, mode, FakeTable()) for mode in modes]  # type: ignore[arg-type]

    monkeypatch.setattr(server_bench, "serve_together", serve_together)
    monkeypatch.setattr(server_bench, "settle", lambda *_: None)
    monkeypatch.setattr(server_bench, "fit_thresholds", lambda *_: 6)
    monkeypatch.setattr(
        server_bench, "_timed", lambda server, *_: 2.0 if server == "stock" else 1.0
    )
    monkeypatch.setattr(
        server_bench, "BudgetOverride", lambda _: SimpleNamespace(set=lambda *_: None)
    )
    return rounds


SERVED = server_bench.ON_CPU._replace(
    modes=("layer", "threshold", "union"), fractions={"full": 1.0, "1/2": 0.5}, beside=2
)


def _measured(is_left: server_bench.IsLeft, folder: Path) -> list[server_bench.Row]:
    batches = server_bench.measure_server("small", SERVED, is_left, folder)
    return [row for batch in batches for row in batch]


def test_every_mode_case_and_budget_gets_one_row_over_stock_in_turn(
    served: list[tuple[str, ...]], tmp_path: Path
) -> None:
    rows = [row for row in _measured(lambda *_: True, tmp_path) if row.mode != "-"]
    assert served == [("layer", "threshold"), ("union",)]
    found = [(row.kind, row.num_tokens, row.mode, row.budget) for row in rows]
    assert len(found) == len(set(found)) == 3 * len(SERVED.cases()) * 2
    assert {row.speedup for row in rows} == {2.0}


def test_a_server_bench_goes_on_with_the_rows_that_are_missing(
    served: list[tuple[str, ...]], tmp_path: Path
) -> None:
    """A first run of one budget, cut behind its first case: nothing of it comes again."""
    results = Results(tmp_path / "moe.csv", dict.fromkeys(SAME_RUN, "x"))

    def is_left(mode: str, case: server_bench.Case, budget: str) -> bool:
        return not results.has(f"server {case.kind}", "small", case.size, mode, budget)

    plan = SERVED._replace(fractions={"full": 1.0})
    first = next(server_bench.measure_server("small", plan, is_left, tmp_path))
    results.add(first, {})
    again = [row for row in _measured(is_left, tmp_path) if row.mode != "-"]
    done = {(row.kind, row.num_tokens, row.mode, row.budget) for row in first if row.mode != "-"}
    new = {(row.kind, row.num_tokens, row.mode, row.budget) for row in again}
    assert done == {("server decode", 1, mode, "full") for mode in ("layer", "threshold")}
    assert not done & new
    assert len(done | new) == 3 * len(SERVED.cases()) * 2
    results.add(again, {})
    assert not SERVED.modes_left(is_left)


@pytest.mark.parametrize("wrong", [["--beside", "0"], ["--beside", "-1"], ["--modes", "fast"]])
def test_what_cannot_be_served_is_refused_by_name(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_main.main([*wrong, "--device", "cpu"])
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_the_layers_of_a_bench_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Path(__file__).parents[2] / "docs" / "results" / "gpu"
    target = tmp_path / "layers.png"
    assert figure.main([str(results / "moe-cuda.csv"), str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert figure.main([str(results / "launch-shapes.csv"), str(target)]) == 1
    assert "--kinds layer" in capsys.readouterr().err
