"""Tiny models, tables and points for the tests of the evaluation."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from reference_factory import make_model, make_windows

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.evaluation.points import Point
from sglang_alloc.evaluation.rules import Subject
from sglang_alloc.model_identity import identity_from_config
from sglang_alloc.reference.architecture import huggingface_config
from sglang_alloc.reference.model import ReferenceModel
from sglang_alloc.reference.thresholds import calibrate_thresholds, measure_saliency

LAYERS, TOP_K = 2, 4


def make_tables(model: ReferenceModel) -> BudgetTables:
    """Tables with every mode's rows; budgets go to the second layer first."""
    windows = make_windows()
    saliency = measure_saliency(model, windows)
    rows = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 4), (3, 4), (4, 4)]
    found = [calibrate_thresholds(model, windows, saliency, row) for row in rows]
    losses = np.linspace(0.6, 0.0, len(rows), dtype=np.float32)
    config = json.loads(json.dumps(huggingface_config(model.config)))
    return BudgetTables(
        model_id="tiny",
        fingerprint=identity_from_config(config).fingerprint(),
        num_experts=model.config.num_experts,
        top_k=TOP_K,
        layer_ids=np.arange(LAYERS, dtype=np.int32),
        budgets=np.arange(LAYERS, LAYERS * TOP_K + 1, dtype=np.int32),
        quotas=np.array(rows, dtype=np.int16),
        predicted_loss=losses,
        sensitivity=np.array([[0.3, 0.2, 0.1, 0.0]] * LAYERS),
        thresholds=np.array([row.thresholds for row in found], dtype=np.float32),
        threshold_quotas=np.array(rows, dtype=np.float32),
        threshold_predicted_loss=losses,
        union_thresholds=np.array([row.thresholds for row in found], dtype=np.float32),
        union_references=np.array([(2, 3)] * (len(rows) - 1) + [(4, 4)], dtype=np.int16),
        union_predicted_loss=losses,
        saliency=saliency.numpy(),
        provenance={"made_by": "a test"},
    )


@contextmanager
def make_subject(family: str = "qwen3_moe") -> Iterator[Subject]:
    """A tiny model with tables and calibration text."""
    model = make_model(family)
    with ThreadPoolExecutor(1) as executor:
        yield Subject(model, make_tables(model), make_windows(), executor)


def make_point(rule: str, budget: int, mean_k: float, nll: list[float]) -> Point:
    """A point with losses alone."""
    return Point(rule, budget, mean_k, {8: 2 * mean_k, 16: 3 * mean_k, 32: 4 * mean_k},
                 {"nll": nll})  # fmt: skip


def write_model(folder: Path, family: str = "qwen3_moe") -> Path:
    """Export a tiny model with its tables, as `sglang-alloc evaluate` takes it."""
    from sglang_alloc.budget_tables import save_budget_tables
    from sglang_alloc.reference.export import export_checkpoint, load_checkpoint

    export_checkpoint(make_model(family), folder)
    save_budget_tables(folder / "budget_tables.npz", make_tables(load_checkpoint(folder)))
    return folder


def routed(tokens: int = 64, top_k: int = TOP_K, experts: int = 8) -> tuple[torch.Tensor, ...]:
    """Ids and descending weights (T, K) as a router gives them, and hidden states (T, 4)."""
    generator = torch.Generator().manual_seed(2)
    weights, ids = torch.rand(tokens, experts, generator=generator).softmax(-1).topk(top_k)
    return torch.zeros(tokens, 4), ids, weights
