"""Simulator check, last two steps: from a measurement's folder to errors, table and figure."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sglang_alloc.bench.simulator_check.errors import WHOLE, Error, compare
from sglang_alloc.bench.simulator_check.felt import Run, Served
from sglang_alloc.bench.simulator_check.figure import write_figure
from sglang_alloc.bench.simulator_check.files import read_served
from sglang_alloc.bench.simulator_check.twin import plant_of, simulate
from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.shared_table import SharedTable, publish_shared_table

PLANTS = ("bench", "service")


def compare_folder(folder: Path, tables: Path, bench_csv: Path | None = None) -> str:
    """Compare `folder`/served.json with the simulator; write what differs; return two tables.

    `tables` are those that were served. Two plants are tried: fitted to `bench_csv` (by default the
    folder's bench.csv), and to what the steps took in service (service.csv).
    """
    served = read_served(folder / "served.json")
    errors = {}
    for plant, path in zip(
        PLANTS, (bench_csv or folder / "bench.csv", folder / "service.csv"), strict=True
    ):
        simulated = simulate_all(served, tables, path, bench_csv or folder / "bench.csv")
        write_figure(folder / f"runs-{plant}.png", served, simulated)
        errors[plant] = [
            error
            for run, model in zip(served.runs, simulated, strict=True)
            for error in compare(served, run, model)
        ]
    write_errors(folder / "errors.csv", errors)
    return "\n\n".join(f"plant: {name}\n\n{markdown(found)}" for name, found in errors.items())


def simulate_all(
    served: Served, tables: Path, plant_csv: Path, bench_csv: Path | None = None
) -> list[Run]:
    """Return the simulated twin of every served run, on the plant of one CSV.

    A controller with a cost model had `bench_csv`, by default the plant's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "twin.tbl"
        publish_shared_table(path, load_budget_tables(tables))
        with SharedTable.open(path) as table:
            plant = plant_of(served, table, plant_csv)
            told = bench_csv or plant_csv
            return [simulate(served, run, plant, table, told) for run in served.runs]


def write_errors(path: Path, errors: Mapping[str, list[Error]]) -> None:
    """Write one line per plant and figure."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["plant", *Error._fields, "difference", "error_ratio"])
        for plant, one in ((plant, one) for plant, found in errors.items() for one in found):
            figures = (one.served, one.simulated, one.difference, one.error_ratio)
            writer.writerow([plant, *one[:4], *(f"{figure:.5f}" for figure in figures)])


def markdown(errors: list[Error], phase: str = WHOLE) -> str:
    """Return the figures of the whole trace: a line per measure, three columns per run."""
    runs = list(dict.fromkeys(error.run for error in errors))
    chosen = [error for error in errors if error.phase == phase]
    heads = [f"{run}: served | simulated | error" for run in runs]
    lines = [f"| {phase} | {' | '.join(heads)} |", "|---" * (1 + 3 * len(runs)) + "|"]
    for measure in dict.fromkeys(error.measure for error in chosen):
        cells = [_cell(error) for error in chosen if error.measure == measure]
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(error: Error) -> str:
    ratio = f"{error.error_ratio:+.0%}" if error.served else f"{error.difference:+.2f}"
    return f"{error.served:.4g} | {error.simulated:.4g} | {ratio}"
