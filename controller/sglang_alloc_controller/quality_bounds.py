"""Control story, before the first step: how far the quality settings let each budget move."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.predicted_loss import predicted_loss
from sglang_alloc.shared_table import SharedTable
from sglang_alloc_controller.bench_csv import read_step_times
from sglang_alloc_controller.budget_range import BudgetRange, by_speed
from sglang_alloc_controller.samples import PHASES, Phase
from sglang_alloc_controller.settings import QualitySettings, Settings
from sglang_alloc_controller.step_times import StepTimes

__all__ = [
    "NO_COST_MODEL",
    "Bounds",
    "bounds_of",
    "budget_ranges",
    "largest_loss",
    "predicted_loss",
]

NO_COST_MODEL = (
    "quality.cost_model is not set, so the law does not look ahead: it gives up quality only after "
    "a queue or late answers, by steps of any budget, the prefill budget first, and goes on trying "
    "about fifty times an hour under more load than full quality carries. With step times of "
    "this server (`sglang-alloc bench`) it takes the budgets that the load needs before that, "
    "and only such as save time."
)


class Bounds(NamedTuple):
    """What a table and the settings allow, and what it is predicted to cost."""

    ranges: dict[Phase, BudgetRange]
    losses: dict[Phase, npt.NDArray[np.float32]]
    """Of every budget of the table, nats per token."""
    budget_min: int
    """The first of them."""

    def predicted_losses(self, budgets: Mapping[Phase, int]) -> dict[Phase, float]:
        """Return what each phase's budget is predicted to lose, nats per token."""
        return {p: float(self.losses[p][budgets[p] - self.budget_min]) for p in PHASES}


def bounds_of(table: SharedTable, settings: Settings) -> Bounds:
    """Return the bounds of a table under these settings.

    Raises:
        ConfigurationError: they do not fit, see `budget_ranges`.
    """
    losses = {phase: predicted_loss(table, phase) for phase in PHASES}
    return Bounds(budget_ranges(table, settings), losses, table.shape.budget_min)


def budget_ranges(table: SharedTable, settings: Settings) -> dict[Phase, BudgetRange]:
    """Return each phase's range: the table's, narrowed by the quality settings.

    Raises:
        ConfigurationError: a budget in the settings has no row, or the bounds leave none.
    """
    ranges = {phase: _range(table, settings.quality, phase) for phase in PHASES}
    if settings.quality.cost_model is not None:
        times = read_step_times(Path(settings.quality.cost_model))
        ranges = {phase: _useful(table, settings, times, phase, ranges[phase]) for phase in PHASES}
    if settings.mode == "fixed" and settings.fixed is not None:
        _require_row(table, "fixed.prefill_budget", settings.fixed.prefill_budget)
        _require_row(table, "fixed.decode_budget", settings.fixed.decode_budget)
    return ranges


def largest_loss(table: SharedTable, phase: Phase, bounds: BudgetRange) -> float:
    """Return the largest predicted loss within the bounds, nats per token."""
    first = table.shape.budget_min
    return float(
        predicted_loss(table, phase)[bounds.floor - first : bounds.ceiling - first + 1].max()
    )


def _useful(
    table: SharedTable, settings: Settings, times: StepTimes, phase: Phase, bounds: BudgetRange
) -> BudgetRange:
    """Return the budgets within the bounds that are worth using, by the measured step times."""
    law, losses = settings.law, predicted_loss(table, phase)
    of_phase = times.prefill if phase == "prefill" else times.decode
    if of_phase.budgets[-1] != table.shape.budget_max:
        raise ConfigurationError(
            f"quality.cost_model is {settings.quality.cost_model}, whose full budget is "
            f"{of_phase.budgets[-1]}; that of {table.path} is {table.shape.budget_max}. Measure "
            "the step times of the model that is served."
        )
    size = law.cost_prefill_tokens if phase == "prefill" else law.cost_batch
    return by_speed(
        bounds,
        of_phase,
        size,
        lambda budget: float(losses[budget - table.shape.budget_min]),
        law.levels_max,
    )


def _range(table: SharedTable, quality: QualitySettings, phase: Phase) -> BudgetRange:
    floor = _optional(table, quality, f"{phase}_floor_budget", table.shape.budget_min)
    ceiling = _optional(table, quality, f"{phase}_ceiling_budget", table.shape.budget_max)
    if quality.max_predicted_loss is not None:
        floor = max(floor, _floor_for_loss(table, phase, quality.max_predicted_loss))
    if floor > ceiling:
        raise ConfigurationError(
            f"The {phase} budget may not go below {floor} (quality.{phase}_floor_budget, "
            f"quality.max_predicted_loss or the table) nor above {ceiling} "
            f"(quality.{phase}_ceiling_budget or the table): no budget is left. Lower the floor or "
            "raise the ceiling or the loss."
        )
    return BudgetRange(floor, ceiling)


def _floor_for_loss(table: SharedTable, phase: Phase, max_loss: float) -> int:
    """Return the smallest budget from which on no budget is predicted to lose more."""
    too_much = np.flatnonzero(predicted_loss(table, phase) > max_loss)
    if not too_much.size:
        return table.shape.budget_min
    floor = table.shape.budget_min + int(too_much[-1]) + 1
    if floor > table.shape.budget_max:
        raise ConfigurationError(
            f"quality.max_predicted_loss is {max_loss} nats per token, but {table.path} predicts "
            f"{float(predicted_loss(table, phase)[-1]):g} for {phase} at full budget already. "
            "Raise it."
        )
    return floor


def _optional(table: SharedTable, quality: QualitySettings, key: str, default: int) -> int:
    budget: int | None = getattr(quality, key)
    if budget is None:
        return default
    _require_row(table, f"quality.{key}", budget)
    return budget


def _require_row(table: SharedTable, key: str, budget: int) -> None:
    shape = table.shape
    if not shape.budget_min <= budget <= shape.budget_max:
        raise ConfigurationError(
            f"{key} is {budget}; {table.path} has budgets from {shape.budget_min} to "
            f"{shape.budget_max} activations per token over {shape.num_layers} MoE layers."
        )
