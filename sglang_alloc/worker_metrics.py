"""Data story: the worker's metrics inside SGLang's own /metrics (multiprocess mode).

Import only in a scheduler process, after SGLang has set PROMETHEUS_MULTIPROC_DIR: the client
library picks its storage when it is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

from sglang_alloc.allocation_mode import PHASES

if TYPE_CHECKING:
    from sglang_alloc.allocation_mode import Phase
    from sglang_alloc.shared_table import Selection
    from sglang_alloc.worker import Worker

DECIDING_SOURCES = ("controller", "override", "fallback")


def _gauge(name: str, documentation: str, *labels: str) -> Gauge:
    return Gauge(
        f"sglang_alloc_{name}", documentation, ("tp_rank", *labels), multiprocess_mode="mostrecent"
    )


class WorkerMetrics:
    """One rank's gauges; `export` refreshes them all from the worker's state."""

    def __init__(self, rank: int) -> None:
        self._rank = str(rank)
        self._budget = _gauge(
            "budget_activations", "Activation budget in force, per token.", "phase"
        )
        self._calm_budget = _gauge(
            "calm_budget_activations",
            "Activation budget, per token, of calm steps: no request waits, and few enough run.",
            "phase",
        )
        self._quota = _gauge(
            "quota_activations",
            "Slots per token that one MoE layer is meant to keep, a mean in mode threshold.",
            "phase",
            "layer",
        )
        self._activations = _gauge(
            "activations_per_token",
            "Measured mean of routed-expert activations per token, over all MoE layers.",
            "phase",
        )
        self._kept_mass = _gauge(
            "kept_mass_ratio", "Measured share of the router's weight that was kept.", "phase"
        )
        self._distinct = _gauge(
            "distinct_experts_per_step",
            "Measured mean of distinct experts per MoE layer and decode step.",
        )
        self._generation = _gauge(
            "acknowledged_generation", "Generation of the selector that this rank put in force."
        )
        self._source = _gauge(
            "selection_source", "1 for the source of the budget in force, else 0.", "source"
        )
        self._fallbacks = Counter(
            "sglang_alloc_fallbacks",
            "Times the configured fallback replaced a stale controller.",
            ("tp_rank",),
        )
        self._fallbacks.labels(self._rank)
        self._tokens = Counter(
            "sglang_alloc_tokens",
            "Tokens that went through the model, by whether their step was calm.",
            ("tp_rank", "phase", "calm"),
        )
        self._own_tokens = Counter(
            "sglang_alloc_own_budget_tokens",
            "Tokens whose request's own budget had them served at full quality, at its floor, or "
            "lower.",
            ("tp_rank", "budget"),
        )
        self._own_ignored = Counter(
            "sglang_alloc_own_budgets_ignored",
            "Requests that were served without the budget of their own that they asked for.",
            ("tp_rank",),
        )
        self._own_ignored.labels(self._rank)
        self._counted_tokens: dict[tuple[Phase, str], int] = {}
        self._counted_own = {"full": 0, "floor": 0, "lower": 0}
        self._counted_ignored = 0
        self._counted_fallbacks = 0
        self._budgets_shown: tuple[int, int] | None = None
        self._calm_shown: Selection | None = None

    def export(self, worker: Worker) -> None:
        """Refresh every metric from `worker`."""
        self._generation.labels(self._rank).set(worker.in_force.generation)
        for source in DECIDING_SOURCES:
            in_use = worker.in_force.source == source
            self._source.labels(self._rank, source).set(float(in_use))
        self._fallbacks.labels(self._rank).inc(worker.fallbacks - self._counted_fallbacks)
        self._counted_fallbacks = worker.fallbacks
        self._export_tokens(worker)
        self._export_own_budgets(worker)
        if worker.calm is not self._calm_shown:
            self._export_calm(worker.calm)
        budgets = (worker.in_force.prefill_budget, worker.in_force.decode_budget)
        if budgets != self._budgets_shown:
            self._export_budgets(worker, budgets)
        self._export_measurements(worker)

    def _export_tokens(self, worker: Worker) -> None:
        for calm, counts in (("yes", worker.tokens.calm), ("no", worker.tokens.other)):
            for phase, tokens in counts.items():
                added = tokens - self._counted_tokens.get((phase, calm), 0)
                self._tokens.labels(self._rank, phase, calm).inc(added)
                self._counted_tokens[phase, calm] = tokens

    def _export_calm(self, calm: Selection) -> None:
        for phase, budget in zip(PHASES, (calm.prefill_budget, calm.decode_budget), strict=True):
            self._calm_budget.labels(self._rank, phase).set(budget)
        self._calm_shown = calm

    def _export_own_budgets(self, worker: Worker) -> None:
        for budget, tokens in worker.own_budget_tokens.items():
            added = tokens - self._counted_own[budget]
            self._own_tokens.labels(self._rank, budget).inc(added)
            self._counted_own[budget] = tokens
        self._own_ignored.labels(self._rank).inc(worker.own_budgets_ignored - self._counted_ignored)
        self._counted_ignored = worker.own_budgets_ignored

    def _export_budgets(self, worker: Worker, budgets: tuple[int, int]) -> None:
        for phase, budget in zip(PHASES, budgets, strict=True):
            self._budget.labels(self._rank, phase).set(budget)
            for layer_id, quota in zip(
                worker.model.layer_ids, worker.quotas(phase, budget), strict=True
            ):
                self._quota.labels(self._rank, phase, str(layer_id)).set(quota)
        self._budgets_shown = budgets

    def _export_measurements(self, worker: Worker) -> None:
        for phase in PHASES:
            measured = worker.statistics.take_recent(phase)
            self._set(self._activations, phase, measured.activations_per_token())
            self._set(self._kept_mass, phase, measured.kept_mass_ratio())
            if phase == "decode" and measured.sampled_forwards:
                layers = measured.sampled_forwards * len(worker.model.layer_ids)
                self._distinct.labels(self._rank).set(measured.distinct_experts / layers)

    def _set(self, gauge: Gauge, phase: Phase, value: float | None) -> None:
        if value is not None:
            gauge.labels(self._rank, phase).set(value)
