"""`sglang-alloc-controller simulate`: what it refuses, writes, keeps and goes on from."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller import cli_simulate
from sglang_alloc_controller.cli import app
from sglang_alloc_controller.cli_simulate import Request, checked, simulate
from sglang_alloc_controller.simulator import pool
from sglang_alloc_controller.simulator.cells import (
    Cell,
    CellStore,
    Finished,
    identity,
    identity_of_others,
)
from sglang_alloc_controller.simulator.deployment import Deployment, read_deployment
from sglang_alloc_controller.simulator.law_names import LAW_NAMES
from sglang_alloc_controller.simulator.pool import run_cells
from sglang_alloc_controller.simulator.world import World

FIRST_COLUMNS = [
    "scenario",
    "law",
    "seed",
    "slo_attainment_ratio",
    "mean_predicted_loss",
    "seconds_below_full",
    "changes_per_hour",
]
# The shortest scenario and the laws that only stand still.
QUICK = Request(("infeasible",), ("full", "floor"), (3,))


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    return read_deployment()


def _rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_results_plots_and_a_summary_are_written(tmp_path: Path, deployment: Deployment) -> None:
    simulate(QUICK._replace(out=tmp_path, workers=1), deployment)
    head, *rows = _rows(tmp_path / "results.csv")
    assert head[:7] == FIRST_COLUMNS
    assert [row[:3] for row in rows] == [["infeasible", "full", "3"], ["infeasible", "floor", "3"]]
    full, floor = (dict(zip(head, row, strict=True)) for row in rows)
    assert full["mean_predicted_loss"] == "0"
    assert float(floor["mean_predicted_loss"]) > 0.3
    assert float(floor["slo_attainment_ratio"]) > float(full["slo_attainment_ratio"])
    assert (tmp_path / "plots" / "infeasible.png").stat().st_size > 10_000
    assert (tmp_path / "summary.md").exists()


def test_a_seed_gives_the_same_run_every_time(deployment: Deployment) -> None:
    cell = Cell("infeasible", "full", 4)
    first, again = (pool.simulate(deployment.world, cell) for _ in range(2))
    assert first == again
    assert pool.simulate(deployment.world, cell._replace(seed=5)).score != first.score


def test_finished_cells_are_kept_and_not_simulated_again(
    tmp_path: Path, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [Cell("infeasible", law, 3) for law in ("full", "floor")]
    store = CellStore(tmp_path, identity(deployment.world))
    store.save(pool.simulate(deployment.world, cells[0]))
    asked: list[Cell] = []

    def in_workers(
        world: World, function: Callable[[World, Cell], Finished], missing: list[Cell], **_: object
    ) -> list[tuple[Cell, Finished]]:
        asked.extend(missing)
        return [(cell, function(world, cell)) for cell in missing]

    monkeypatch.setattr(pool, "in_workers", in_workers)
    finished = run_cells(deployment.world, cells, store, 1, lambda share, left: None)
    assert asked == [cells[1]]
    assert [one.cell for one in finished] == cells
    assert repr(run_cells(deployment.world, cells, store, 1, print)) == repr(finished)
    assert len(asked) == 1


def test_cells_of_another_plant_or_cut_off_ones_do_not_count(
    tmp_path: Path, deployment: Deployment
) -> None:
    cell = Cell("infeasible", "full", 3)
    CellStore(tmp_path, "another").save(pool.simulate(deployment.world, cell))
    assert CellStore(tmp_path, "another").load(cell) is not None
    assert CellStore(tmp_path, identity(deployment.world)).load(cell) is None
    (file,) = (tmp_path / "cells").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert CellStore(tmp_path, "another").load(cell) is None


def test_cells_of_other_laws_outlive_a_change_of_ours(
    tmp_path: Path, deployment: Deployment
) -> None:
    world = deployment.world
    law = world.settings.law.model_copy(update={"load_miss_price_nats": 0.3})
    changed = replace(world, settings=world.settings.model_copy(update={"law": law}))
    assert identity(changed) != identity(world)
    assert identity_of_others(changed) == identity_of_others(world)
    slower = replace(world, plant=world.plant.with_gain(0.5))
    assert identity_of_others(slower) != identity_of_others(world)
    finished = pool.simulate(world, Cell("infeasible", "full", 3))
    CellStore(tmp_path, identity(world), identity_of_others(world)).save(finished)
    ours = finished._replace(cell=finished.cell._replace(law="ours"))
    CellStore(tmp_path, identity(world), identity_of_others(world)).save(ours)
    store = CellStore(tmp_path, identity(changed), identity_of_others(changed))
    assert store.load(finished.cell) is not None
    assert store.load(ours.cell) is None


def test_all_means_every_scenario_law_and_default_seed() -> None:
    request = checked((), (), (), everything=True)
    assert {"ours", "oracle", "full", "floor", "best-static"} < set(request.laws)
    assert request.laws == LAW_NAMES
    assert len(request.scenarios) >= 14
    assert request.gains[0] == 0.5
    assert checked((), (), (9,), everything=True).seeds == (9,)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--scenario NAME, or --all"),
        (("--scenario", "nope"), "no scenario 'nope'"),
        (("--scenario", "step", "--law", "nope"), "no law 'nope'"),
        (("--scenario", "step", "--seed", "-1"), "--seed"),
        (("--scenario", "step", "--bench", "/nope.csv"), "cannot be read"),
        (("--scenario", "step", "--prompt-tokens", "8000"), "no SLO fits"),
        (("--scenario", "step", "--prompt-tokens", "100000"), "KV memory"),
        (("--scenario", "step", "--output-tokens", "100000"), "KV memory"),
        (("--scenario", "step", "--tables", "/nope.npz"), "no budget tables"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_sentence(
    arguments: tuple[str, ...], said: str
) -> None:
    result = CliRunner().invoke(app, ["simulate", *arguments])
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize("blocked", ["", "cells", "plots"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_simulation(
    tmp_path: Path, deployment: Deployment, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    def begins(*_: object) -> None:
        raise AssertionError("the simulation began")

    monkeypatch.setattr(cli_simulate, "run_cells", begins)
    out = tmp_path / "out"
    (out / blocked).parent.mkdir(exist_ok=True)
    (out / blocked).write_text("", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        simulate(QUICK._replace(laws=("full",), out=out, workers=1), deployment)


def test_a_plot_that_cannot_be_written_is_told_in_a_sentence(
    tmp_path: Path, deployment: Deployment
) -> None:
    (tmp_path / "plots" / "infeasible.png").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="plots cannot be written"):
        simulate(QUICK._replace(laws=("full",), out=tmp_path, workers=1), deployment)


def test_losses_are_stretched_over_a_bench_of_another_model(tmp_path: Path) -> None:
    bench = tmp_path / "bench.csv"
    rows = [
        f"{phase},{concurrency},{budget},{concurrency * (4 + budget / 10)},100"
        for phase in ("prefill", "decode")
        for concurrency in (1, 16)
        for budget in (10, 40, 80)
    ]
    head = "phase,concurrency,budget,median_ms,prefill_prompt_tokens"
    bench.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    stretched = read_deployment(bench)
    shipped = read_deployment().world.plant
    assert stretched.world.ceiling == (80, 80)
    assert stretched.world.plant.decode_loss(40) == pytest.approx(shipped.decode_loss(20))
    assert stretched.world.plant.decode_loss(80) == 0.0
    assert "stretched" in stretched.description


def test_a_bench_on_which_no_slo_fits_is_refused(tmp_path: Path) -> None:
    """Seconds in place of milliseconds, say."""
    bench = tmp_path / "bench.csv"
    rows = ["phase,concurrency,budget,median_ms"]
    for budget, share in ((40, 1.0), (5, 0.5)):
        rows += [f"decode,{size},{budget},{share * 10:g}" for size in (1, 16)]
        rows += [f"prefill,{size},{budget},{share * 90 * size:g}" for size in (512, 2048)]
    bench.write_text("\n".join(rows) + "\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"no SLO fits.*timed at 512, 2048 tokens"):
        read_deployment(bench)
