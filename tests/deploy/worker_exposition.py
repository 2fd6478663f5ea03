"""Print the worker's metrics after one busy minute; a process of its own, for its global registry.

The class that makes them is the real one. Only the worker behind it is set by hand, so that the
metrics exist without a model and an engine.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from prometheus_client import generate_latest

from sglang_alloc.calm_steps import ServedTokens, calm_selection
from sglang_alloc.shared_table import CalmBudgets, Selection
from sglang_alloc.worker_metrics import WorkerMetrics
from sglang_alloc.worker_statistics import PhaseStatistics, WorkerStatistics

LAYER_IDS = (0, 1, 2, 3)
FULL_BUDGET, DECODE_BUDGET = 8, 6


def _measured() -> WorkerStatistics:
    statistics = WorkerStatistics(num_experts=64)
    for phase, budget in (("prefill", FULL_BUDGET), ("decode", DECODE_BUDGET)):
        statistics.by_phase[phase] = PhaseStatistics(
            forwards=100,
            sampled_forwards=10,
            tokens=80,
            activations=80 * budget,
            mass=320.0,
            kept_mass=320.0 * budget / FULL_BUDGET,
            distinct_experts=400,
        )
    return statistics


def _tokens() -> ServedTokens:
    tokens = ServedTokens()
    tokens.calm.update(prefill=900, decode=300)
    tokens.other.update(prefill=100, decode=100)
    return tokens


def main() -> None:
    """Print one exposition."""
    calm = CalmBudgets(FULL_BUDGET, FULL_BUDGET)
    selection = Selection("controller", 7, FULL_BUDGET, DECODE_BUDGET, calm)
    worker: Any = SimpleNamespace(
        in_force=selection,
        calm=calm_selection(selection),
        tokens=_tokens(),
        fallbacks=1,
        own_budget_tokens={"full": 30, "floor": 20, "lower": 10},
        own_budgets_ignored=1,
        model=SimpleNamespace(layer_ids=LAYER_IDS),
        quotas=lambda _phase, budget: [budget // len(LAYER_IDS)] * len(LAYER_IDS),
        statistics=_measured(),
    )
    WorkerMetrics(rank=0).export(worker)
    print(generate_latest().decode(), end="")


if __name__ == "__main__":
    main()
