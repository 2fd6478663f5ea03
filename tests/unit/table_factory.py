"""Small budget tables and shared tables for the tests."""

from pathlib import Path
from typing import Any

import numpy as np

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.shared_table import SharedTable, publish_shared_table
from sglang_alloc.solve import solve_all_budgets

FINGERPRINT = "0123456789abcdef" * 4


def make_tables(
    num_layers: int = 3, top_k: int = 4, num_experts: int = 8, seed: int = 0, **fields: Any
) -> BudgetTables:
    """Tables with falling sensitivities, so that row n spends exactly `budgets[n]`."""
    random = np.random.default_rng(seed)
    sensitivity = random.random((num_layers, top_k)).cumsum(axis=1)[:, ::-1]
    solution = solve_all_budgets(sensitivity)
    required = {
        "model_id": "tiny-moe",
        "fingerprint": FINGERPRINT,
        "num_experts": num_experts,
        "top_k": top_k,
        "layer_ids": np.arange(1, num_layers + 1, dtype=np.int32),
        "budgets": solution.budgets,
        "quotas": solution.quotas,
        "predicted_loss": solution.predicted_loss,
    }
    return BudgetTables(**(required | fields))


def make_full_tables(num_layers: int = 3, top_k: int = 4, num_experts: int = 8) -> BudgetTables:
    """Tables with every optional array present."""
    plain = make_tables(num_layers, top_k, num_experts)
    random = np.random.default_rng(1)
    per_layer = plain.quotas.shape
    return make_tables(
        num_layers,
        top_k,
        num_experts,
        sensitivity=random.random((num_layers, top_k)),
        prefill_quotas=np.where(np.arange(len(plain.budgets))[:, None] > 0, plain.quotas, 1),
        prefill_predicted_loss=plain.predicted_loss / 2,
        thresholds=random.random(per_layer).astype(np.float32),
        prefill_thresholds=random.random(per_layer).astype(np.float32),
        threshold_quotas=plain.quotas.astype(np.float32),
        threshold_predicted_loss=plain.predicted_loss / 3,
        prefill_threshold_quotas=plain.quotas.astype(np.float32),
        prefill_threshold_loss=plain.predicted_loss / 4,
        prefill_sensitivity=random.random((num_layers, top_k)),
        union_quotas=plain.quotas,
        union_thresholds=random.random(per_layer).astype(np.float32),
        union_references=plain.quotas,
        union_predicted_loss=plain.predicted_loss / 5,
        references=plain.quotas,
        gains=random.random(per_layer).astype(np.float32),
        prefill_gains=random.random(per_layer).astype(np.float32),
        saliency=random.random((num_layers, num_experts)).astype(np.float32),
        provenance={"seed": 1, "calibration": {"tokens": 4096}},
    )


def publish_and_open(path: Path, **fields: Any) -> SharedTable:
    """A freshly published shared table, open for writing."""
    publish_shared_table(path, make_tables(**fields))
    return SharedTable.open(path)
