"""Simulator, before the third step: the files that describe a server become a world.

Without files it is the shipped plant: the reference model on two CPU cores.
"""

import tempfile
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.predicted_loss import predicted_loss
from sglang_alloc.shared_table import SharedTable, publish_shared_table
from sglang_alloc_controller.bench_csv import DEFAULT_BENCH, read_step_times
from sglang_alloc_controller.budget_range import BudgetRange, by_speed
from sglang_alloc_controller.samples import PHASES, Phase
from sglang_alloc_controller.settings import Settings
from sglang_alloc_controller.simulator.plant import Plant
from sglang_alloc_controller.simulator.workload import RequestMix
from sglang_alloc_controller.simulator.world import World, find_capacities, fitting_settings

DEFAULT_TABLES = Path(
    str(files("sglang_alloc").joinpath("reference/qwen3-moe-ref/budget_tables.npz"))
)
# A page in, a paragraph out: at full budget the shipped plant then spends about as long on the
# prefill of a request as on its share of the decode steps, so that both budgets matter.
DEFAULT_MIX = RequestMix(prompt_tokens=512, output_tokens=32, spread=0.5)
# `settings.table` of a world: the laws of the simulator open no table.
_NO_TABLE = "simulated"


class Losses(NamedTuple):
    """Predicted loss of every budget from `budget_min` on, nats per token."""

    budget_min: int
    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    @property
    def budget_max(self) -> int:
        """The full budget."""
        return self.budget_min + len(self.decode) - 1


class Deployment(NamedTuple):
    """A world, and in words where its figures come from."""

    world: World
    description: str


def read_deployment(
    bench: Path | None = None, tables: Path | None = None, mix: RequestMix = DEFAULT_MIX
) -> Deployment:
    """Return the world of a bench CSV and of budget tables; None: the shipped ones.

    The shipped losses are stretched over the budgets of a bench of another model.

    Raises:
        ConfigurationError: a file cannot be read, or the two are of different models.
        TableFormatError: the tables are no budget tables.
    """
    times = read_step_times(bench or DEFAULT_BENCH)
    losses = read_losses(tables or DEFAULT_TABLES)
    description = f"step times {times.source}, losses {(tables or DEFAULT_TABLES).name}"
    full = times.decode.budgets[-1]
    if losses.budget_max != full:
        if tables is not None:
            raise ConfigurationError(
                f"The full budget of {bench or DEFAULT_BENCH} is {full} and that of {tables} is "
                f"{losses.budget_max}: they are of different models. Give a bench and tables of "
                "the same one."
            )
        losses = stretched(losses, times.decode.budgets[0], full)
        description += " of the shipped model, stretched over the budgets of the bench"
    plant = Plant(times, losses.budget_min, full, losses.prefill, losses.decode)
    return Deployment(make_world(plant, mix, bench or DEFAULT_BENCH), description)


def make_world(plant: Plant, mix: RequestMix, cost_model: Path) -> World:
    """Return the world of a plant: SLOs and rates that fit it, and the default settings."""
    content = {"table": _NO_TABLE, "quality": {"cost_model": str(cost_model)}}
    settings = fitting_settings(plant, mix, content)
    ranges = useful_ranges(plant, settings)
    floor, ceiling = (
        tuple(getattr(ranges[phase], end) for phase in PHASES) for end in ("floor", "ceiling")
    )
    capacities = find_capacities(
        plant, mix, settings, (ceiling[0], ceiling[1]), (floor[0], floor[1])
    )
    return World(plant, mix, settings, ranges, capacities)


def useful_ranges(plant: Plant, settings: Settings) -> dict[Phase, BudgetRange]:
    """Return the budgets that production would use on a server with these step times."""
    bounds = BudgetRange(plant.budget_min, plant.budget_max)
    law = settings.law
    prefill, decode = plant.times.prefill, plant.times.decode
    return {
        "prefill": by_speed(
            bounds,
            prefill,
            law.cost_prefill_tokens,
            plant.prefill_loss,
            law.levels_max,
        ),
        "decode": by_speed(
            bounds,
            decode,
            law.cost_batch,
            plant.decode_loss,
            law.levels_max,
        ),
    }


def read_losses(path: Path) -> Losses:
    """Return the predicted losses of budget tables, as the controller would read them.

    Raises:
        TableFormatError: the file is missing or holds no budget tables.
    """
    tables = load_budget_tables(path)
    with tempfile.TemporaryDirectory() as folder:
        published = Path(folder) / "table"
        publish_shared_table(published, tables)
        table = SharedTable.open(published)
        try:
            prefill, decode = (
                tuple(float(loss) for loss in predicted_loss(table, phase)) for phase in PHASES
            )
            return Losses(table.shape.budget_min, prefill, decode)
        finally:
            table.close()


def stretched(losses: Losses, budget_min: int, budget_max: int) -> Losses:
    """Return the losses by share of the full budget, for the budgets of another model."""
    shares = [budget / budget_max for budget in range(budget_min, budget_max + 1)]
    known = range(losses.budget_min, losses.budget_max + 1)
    prefill, decode = (
        tuple(float(loss) for loss in np.interp([one * known[-1] for one in shares], known, column))
        for column in (losses.prefill, losses.decode)
    )
    return Losses(budget_min, prefill, decode)
