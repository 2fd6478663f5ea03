"""Offline story, checking: held-out loss above the full model, rule by rule and by budget."""

import csv
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.reference.allocations import (
    KeptCounter,
    layer_allocation,
    referenced,
    threshold_allocation,
)
from sglang_alloc.reference.gains import gained
from sglang_alloc.reference.heldout import token_losses
from sglang_alloc.reference.model import Allocation, ReferenceModel


class LossRow(NamedTuple):
    """What one mode costs at one budget; losses in nats per byte above the full model."""

    mode: str
    budget: int
    kept_activations: float  # measured, per token, summed over the layers
    loss: float
    domain_losses: dict[str, float]


class HeldOut(NamedTuple):
    """Windows (B, S + 1) per domain, and the full model's loss (B, S) of each of their bytes."""

    windows: dict[str, Tensor]
    full_losses: dict[str, Tensor]


def held_out(model: ReferenceModel, windows: dict[str, Tensor]) -> HeldOut:
    """Measure the full model once, for every comparison with it."""
    return HeldOut(windows, {domain: token_losses(model, w) for domain, w in windows.items()})


def threshold_of_tables(tables: BudgetTables, budget: int, saliency: Tensor) -> Allocation:
    """Mode `threshold` with the thresholds, references and gains of the tables, as it is served.

    saliency: the tables', (L, E).
    """
    row = budget - tables.budget_min
    assert tables.thresholds is not None
    rule = threshold_allocation(tables.thresholds[row].tolist(), saliency)
    if tables.references is not None:
        rule = referenced(rule, tables.references[row].tolist(), saliency)
    if tables.gains is not None:
        rule = gained(rule, tables.gains[row].tolist())
    return rule


def compare_modes(
    model: ReferenceModel,
    tables: BudgetTables,
    text: HeldOut,
    budgets: Iterable[int],
    executor: Executor,
) -> Iterator[LossRow]:
    """Measure the modes `threshold` and `layer` at `budgets`, several at once, in order."""
    assert tables.saliency is not None
    saliency = torch.from_numpy(tables.saliency)
    rules: list[tuple[str, int, Allocation]] = []
    for budget in budgets:
        quotas = tables.quotas[budget - tables.budget_min].tolist()
        rules.append(("threshold", budget, threshold_of_tables(tables, budget, saliency)))
        rules.append(("layer", budget, layer_allocation(quotas)))

    def measure(rule: tuple[str, int, Allocation]) -> LossRow:
        mode, budget, allocation = rule
        return measure_rule(model, mode, budget, allocation, text)

    return executor.map(measure, rules)


def measure_rule(
    model: ReferenceModel, mode: str, budget: int, allocation: Allocation, text: HeldOut
) -> LossRow:
    """Measure one rule against the full model; `mode` and `budget` only name the row."""
    counter = KeptCounter(allocation, model.config.num_layers)
    losses = {
        domain: float((token_losses(model, windows, counter) - text.full_losses[domain]).mean())
        for domain, windows in text.windows.items()
    }
    mean = float(np.mean(list(losses.values())))
    return LossRow(mode, budget, float(counter.mean_kept.sum()), mean, losses)


def loss_table_text(rows: list[LossRow]) -> str:
    """The comparison as a Markdown table, one line per budget, largest first."""
    by_place = {(row.mode, row.budget): row for row in rows}
    head = "| budget | threshold: kept | threshold: loss | layer: kept | layer: loss |"
    lines = [head, "|" + "---|" * 5]
    for budget in sorted({row.budget for row in rows}, reverse=True):
        pair = (by_place["threshold", budget], by_place["layer", budget])
        cells = " | ".join(f"{row.kept_activations:.2f} | {row.loss:+.4f}" for row in pair)
        lines.append(f"| {budget} | {cells} |")
    return "\n".join(lines) + "\n"


def write_loss_rows(path: Path, rows: list[LossRow]) -> None:
    """Write the comparison as CSV; the mean weighs the domains equally."""
    domains = list(rows[0].domain_losses)
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["mode", "budget", "kept_activations", "loss_above_full",
                        *(f"{d}_loss_above_full" for d in domains)])  # fmt: skip
        for row in rows:
            lines.writerow([row.mode, row.budget, f"{row.kept_activations:.3f}", f"{row.loss:.5f}",
                            *(f"{row.domain_losses[d]:.5f}" for d in domains)])  # fmt: skip
