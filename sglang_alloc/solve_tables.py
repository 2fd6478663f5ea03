"""Offline story, solving: budget tables out of a file of sensitivities."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sglang_alloc.budget_tables import BudgetTables, save_budget_tables
from sglang_alloc.npz_file import write_npz
from sglang_alloc.sensitivity_file import Sensitivities
from sglang_alloc.solve import Solution, solve_all_budgets
from sglang_alloc.solve_bounds import QuotaBounds


def solved_tables(sensitivities: Sensitivities, bounds: QuotaBounds) -> BudgetTables:
    """Solve every matrix of a profiled model on its own: decode, prefill and union.

    What mode `threshold` needs is added by `sglang-alloc calibrate`.
    """
    model = sensitivities.model
    assert model is not None
    decode = solve_all_budgets(sensitivities.sensitivity, bounds=bounds)
    tables = BudgetTables(
        model_id=model.model_id,
        fingerprint=model.fingerprint,
        num_experts=model.num_experts,
        top_k=sensitivities.top_k,
        layer_ids=np.array(model.layer_ids, np.int32),
        budgets=decode.budgets,
        quotas=decode.quotas,
        predicted_loss=decode.predicted_loss,
        sensitivity=sensitivities.sensitivity,
        saliency=sensitivities.saliency,
        provenance={**sensitivities.provenance, **_bounds_note(bounds, sensitivities.top_k)},
    )
    if sensitivities.prefill_sensitivity is not None:
        prefill = solve_all_budgets(sensitivities.prefill_sensitivity, bounds=bounds)
        tables = replace(
            tables,
            prefill_sensitivity=sensitivities.prefill_sensitivity,
            prefill_quotas=prefill.quotas,
            prefill_predicted_loss=prefill.predicted_loss,
        )
    if sensitivities.union_sensitivity is not None:
        union = solve_all_budgets(sensitivities.union_sensitivity, bounds=bounds)
        tables = replace(
            tables, union_quotas=union.quotas, union_predicted_loss=union.predicted_loss
        )
    return tables


def solve_file(sensitivities: Sensitivities, bounds: QuotaBounds, output: Path) -> Solution:
    """Solve `sensitivities` and write `output`; return decode's solution.

    A profiled model gives budget tables. A bare matrix gives `budgets` (N,), `quotas` (N, L),
    `predicted_loss` (N,), `sensitivity` and `provenance`, which no server can be given.

    Raises:
        TableFormatError: the file cannot be written.
        ConfigurationError: the bounds leave no quota.
    """
    solution = solve_all_budgets(sensitivities.sensitivity, bounds=bounds)
    if sensitivities.model is not None:
        save_budget_tables(output, solved_tables(sensitivities, bounds))
        return solution
    provenance = {**sensitivities.provenance, **_bounds_note(bounds, sensitivities.top_k)}
    fields: dict[str, Any] = {
        **solution._asdict(),
        "sensitivity": sensitivities.sensitivity,
        "provenance": np.str_(json.dumps(provenance, sort_keys=True)),
    }
    write_npz(output, fields, "solved tables")
    return solution


def _bounds_note(bounds: QuotaBounds, top_k: int) -> dict[str, object]:
    note: dict[str, object] = {"solved_by": "sglang_alloc.solve, exact"}
    if (bounds.lower > 1).any() or (bounds.upper < top_k).any():
        note["min_quotas"] = bounds.lower.tolist()
        note["max_quotas"] = bounds.upper.tolist()
    return note
