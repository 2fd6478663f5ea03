"""Simulator, the door: `sglang-alloc-controller simulate`."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from sglang_alloc.atomic_file import replace_file
from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.simulator.cells import (
    Cell,
    CellStore,
    Finished,
    identity,
    identity_of_others,
)
from sglang_alloc_controller.simulator.deployment import Deployment
from sglang_alloc_controller.simulator.law_names import LAW_NAMES, OURS
from sglang_alloc_controller.simulator.pool import run_cells
from sglang_alloc_controller.simulator.results import (
    gains_csv,
    results_csv,
    summary_markdown,
    verdicts,
)
from sglang_alloc_controller.simulator.scenarios import SCENARIOS

DEFAULT_SEEDS = (1, 2)
# The plant may differ from its bench by a factor of two either way (constant load must stay calm).
GAINS = (0.5, 0.75, 1.5, 2.0)
_PLAIN_LINE_STEP = 0.05
_FILE_MODE = 0o644


class Request(NamedTuple):
    """What is to be simulated, and where the results go."""

    scenarios: tuple[str, ...]
    laws: tuple[str, ...]
    seeds: tuple[int, ...]
    gains: tuple[float, ...] = ()
    """Further gains at which our law meets each constant load."""
    out: Path | None = None
    workers: int = 0
    """0: one for each core."""


def checked(
    scenarios: Sequence[str], laws: Sequence[str], seeds: Sequence[int], everything: bool
) -> Request:
    """Return the request, with the defaults where nothing was chosen.

    Raises:
        ConfigurationError: there is no such scenario or law, or nothing was asked for.
    """
    if not scenarios and not everything:
        raise ConfigurationError(
            "Nothing was asked for: give --scenario NAME, or --all for every scenario. The "
            f"scenarios are {', '.join(one.name for one in SCENARIOS)}."
        )
    known = tuple(one.name for one in SCENARIOS)
    chosen = known_only("scenario", scenarios, known)
    default_laws = LAW_NAMES if everything else (OURS,)
    return Request(
        chosen if scenarios else known,
        known_only("law", laws, LAW_NAMES) if laws else default_laws,
        tuple(dict.fromkeys(seeds)) or (DEFAULT_SEEDS if everything else DEFAULT_SEEDS[:1]),
        GAINS if everything and not laws and not scenarios else (),
    )


def simulate(request: Request, deployment: Deployment) -> str:
    """Simulate, write the files to the output folder, and return a summary to be printed.

    Raises:
        ConfigurationError: a file cannot be written, or matplotlib is not there.
    """
    out = request.out
    if out is not None and find_spec("matplotlib") is None:
        raise ConfigurationError(
            "The plots need matplotlib, which is not installed. Install it from the clone with "
            "`pip install '.[report]'`, or leave --out away to print the table only."
        )
    if out is not None:
        try_writing(out, "results.csv")
        try_writing(out / "cells", "*.json")
        try_writing(out / "plots", "*.png")
    world = deployment.world
    store = CellStore(out, identity(world), identity_of_others(world)) if out else None
    workers = request.workers or os.cpu_count() or 1
    with shown_progress(Console(stderr=True)) as shown:
        cells = [*_cells(request), *_gain_cells(request)]
        finished = run_cells(world, cells, store, workers, shown)
    plain = [one for one in finished if one.cell.gain == 1.0]
    summary = f"{deployment.description}\n\n{summary_markdown(verdicts(plain))}"
    if out is not None:
        _write_all(out, plain, finished, summary)
    return results_csv(plain) if OURS not in request.laws or len(plain) == 1 else summary


def _cells(request: Request) -> Iterator[Cell]:
    for scenario in request.scenarios:
        for law in request.laws:
            for seed in request.seeds:
                yield Cell(scenario, law, seed)


def _gain_cells(request: Request) -> Iterator[Cell]:
    for one in SCENARIOS:
        if one.constant and request.gains:
            for gain in request.gains:
                yield from (Cell(one.name, OURS, seed, gain) for seed in request.seeds)


def _write_all(
    out: Path, plain: Sequence[Finished], finished: Sequence[Finished], summary: str
) -> None:
    write_result(out / "results.csv", results_csv(plain))
    write_result(out / "summary.md", summary)
    if len(finished) > len(plain):
        write_result(out / "gains.csv", gains_csv(finished))
    plots = out / "plots"
    try:
        _draw_all(plots, plain)
    except OSError as error:
        raise unwritable(plots, error) from error


def _draw_all(plots: Path, plain: Sequence[Finished]) -> None:
    from sglang_alloc_controller.simulator.plots import draw_overview, draw_scenario

    for scenario in dict.fromkeys(one.cell.scenario for one in plain):
        of_scenario = [one for one in plain if one.cell.scenario == scenario]
        seed = of_scenario[0].cell.seed
        runs = {one.cell.law: one for one in of_scenario if one.cell.seed == seed}
        draw_scenario(plots / f"{scenario}.png", scenario, runs)
    found = verdicts(plain)
    if found:
        draw_overview(plots / "overview.png", found)


def try_writing(folder: Path, name: str) -> None:
    """Raise now what would be raised when the first run is finished, the longest of all.

    Raises:
        ConfigurationError: no file like `name` can be written to the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder / name, error) from error


def write_result(path: Path, text: str) -> None:
    """Write a file of the output folder in one step; raises ConfigurationError."""
    try:
        replace_file(path, text.encode(), mode=_FILE_MODE)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> ConfigurationError:
    """Return what to say of a file of the output folder that cannot be written."""
    return ConfigurationError(
        f"{path} cannot be written: {error.strerror}. Choose another --out, or free some space and "
        "run the same command again: what is finished is kept."
    )


def known_only(what: str, asked: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return what was asked for, each once; raises ConfigurationError for an unknown one."""
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ConfigurationError(
            f"There is no {what} {unknown[0]!r}. Choose among {', '.join(known)}."
        )
    return tuple(dict.fromkeys(asked))


@contextmanager
def shown_progress(console: Console) -> Iterator[Callable[[float, str], None]]:
    """Yield what shows progress: a bar on a terminal, elsewhere a line for every twentieth."""
    if console.is_terminal:
        columns = (
            TextColumn("simulating"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=1.0, left="")
            yield lambda share, left: bar.update(task, completed=share, left=left)
        return
    printed = [-_PLAIN_LINE_STEP]

    def plain(share: float, left: str) -> None:
        if share >= printed[0] + _PLAIN_LINE_STEP:
            printed[0] = share
            console.print(f"simulated {100 * share:.0f} % ({left})", highlight=False, markup=False)

    yield plain
