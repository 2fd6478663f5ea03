"""Data story: one SGLang scheduler process following the shared table, with no SGLang import.

`plugin.py` calls these methods from the engine's seams; docs/life-of-a-budget-change.md tells in
which order.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_alloc.allocation_mode import PHASES, probe_of_note
from sglang_alloc.budget_follower import BudgetChange, BudgetFollower
from sglang_alloc.calm_steps import ServedTokens, calm_below, calm_selection
from sglang_alloc.enforcement_device import DeviceEnforcement
from sglang_alloc.enforcement_host import HostEnforcement
from sglang_alloc.enforcement_probe import NO_RECORDERS, ProbeEnforcement, ProbeRecorders
from sglang_alloc.errors import (
    ModelMismatchError,
    RequestBudgetError,
    UnsupportedServerError,
)
from sglang_alloc.priority_floors import floors_text
from sglang_alloc.request_budget import OwnBudgets, budgets_of_tokens
from sglang_alloc.serving_rules import facts_of, mode_to_serve
from sglang_alloc.shared_table import Selection, SharedTable, WorkerCounters
from sglang_alloc.shared_table_words import source_code
from sglang_alloc.step_record import StepRecord
from sglang_alloc.threshold_drift import ThresholdDrift
from sglang_alloc.worker_statistics import PhaseStatistics, WorkerStatistics
from sglang_alloc.worker_tables import enforcement_tables, probe_rows

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from sglang_alloc.allocation_mode import Mode, Phase
    from sglang_alloc.enforcement import Enforcement, RoutedSlots
    from sglang_alloc.worker_metrics import WorkerMetrics
    from sglang_alloc.worker_settings import WorkerSettings
    from sglang_alloc_kernels.budgeted_routing import Router

logger = logging.getLogger("sglang_alloc")

REPORT_EVERY_NS = 500_000_000  # counters and metrics are for people and scrapers: twice a second


class ServedModel(NamedTuple):
    """The model as this rank serves it: what the table has to fit."""

    name: str
    fingerprint: str
    layer_ids: tuple[int, ...]  # of the MoE layers, ascending
    top_k: int  # routed experts per token
    num_experts: int
    rank: int  # slot of this process in the shared table
    device_type: str  # "cpu", "cuda", ...


class Worker:
    """State of one rank: the budget in force, its enforcement, and what it measured."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.table = SharedTable.open(settings.table_path)
        self.mode: Mode = mode_to_serve(settings, facts_of(self.table))
        rule = ":".join(
            (
                *(self.mode, self.table.payload_digest),
                *(settings.request_budgets, floors_text(settings.priority_floors)),
                settings.routing,
            )
        )
        self._follower = BudgetFollower(
            self.table, rule, settings.stale_after_seconds, settings.fallback
        )
        full = self.table.shape.budget_max
        self.in_force = Selection("fallback", 0, full, full)
        self.calm = self.in_force  # what calm steps obey (`calm_steps.py`)
        self._obeyed = self.in_force  # by the forward under way, or else by the last
        # How many requests the next batch leaves waiting, and how many of those it does not prefill
        # run already. Until somebody tells, no step is calm.
        self.requests_waiting: int | None = None
        self.requests_running = 0
        self._calm_below = calm_below(self.in_force)
        self.tokens = ServedTokens()
        self.steps = 0
        self._phase: Phase = "decode"  # of the forward or capture under way, or else the last
        self._is_watching = False  # whether that is a forward, whose layers must have routed
        self.fallbacks = 0
        # Tokens that were served above and below the budget in force, because their request has
        # one of its own; and requests whose wish could not be granted.
        self.own_budget_tokens = {"full": 0, "floor": 0, "lower": 0}
        self.own_budgets_ignored = 0
        self._controlled = False  # whether a controller was in charge last, overrides aside
        self._reported_ns = 0

    def bind(
        self, model: ServedModel, enforcement: Enforcement, metrics: WorkerMetrics | None
    ) -> None:
        """Attach to the loaded model. Call once, after `check_fits`."""
        self.model = model
        self.enforcement = enforcement
        self.metrics = metrics
        self._on_device = enforcement if isinstance(enforcement, DeviceEnforcement) else None
        self.statistics = WorkerStatistics(model.num_experts, len(model.layer_ids))
        self._drift = self._make_drift() if self.settings.correct_drift else None
        self.watch_layers()
        self._slot = self.table.worker_slot(model.rank)
        self._record = (
            StepRecord(self.settings.step_record, model.rank) if self.settings.step_record else None
        )
        self.report(time.monotonic_ns())

    @property
    def rule(self) -> str:
        """What ranks must agree on, or their partial sums are those of different mixtures."""
        return self._follower.rule

    def agree_on(self, fact: str) -> None:
        """Let `apply` stop ranks that differ in this fact too. Call before the first `poll`."""
        self._follower.rule = f"{self.rule}:{fact}"

    def poll(self, now_ns: int) -> BudgetChange | None:
        """Leading rank, once per scheduler iteration: return a change for all ranks, or None."""
        change = self._follower.poll(now_ns)
        if self._drift is None or not self._thresholds_moved(self._drift):
            return change
        selection = self.in_force if change is None else change.selection
        return BudgetChange(selection, self.rule, self._drift.factors())

    def _thresholds_moved(self, drift: ThresholdDrift) -> bool:
        budgets = (self.in_force.prefill_budget, self.in_force.decode_budget)
        if self._on_device is None:
            kept = {phase: self.statistics.kept_by_layer(phase) for phase in PHASES}
        else:
            kept = self._on_device.kept_by_layer()
        moved = [
            drift.observe(phase, budget, kept[phase])
            for phase, budget in zip(PHASES, budgets, strict=True)
            if phase in kept
        ]
        return any(moved)

    def _make_drift(self) -> ThresholdDrift:
        tables = enforcement_tables(self.table, self.mode)
        return ThresholdDrift(tables, delayed=self._on_device is not None)

    def apply(self, change: BudgetChange) -> None:
        """Every rank, before the batch that follows: put the change in force.

        Raises UnsupportedServerError, which stops the server, when the sending rank means other
        quotas by the same budgets: partial sums of different mixtures would be added up. The first
        change comes before the first request.
        """
        if change.rule != self.rule:
            raise UnsupportedServerError(
                f"rank {self.model.rank} follows {self.rule} and the leading rank {change.rule} "
                f"(mode:contents of {self.settings.table_path}:request budgets:floors of "
                "priorities:routing:layers that our kernel routes): give all ranks the same table "
                "and settings, and publish no other table while the server starts"
            )
        selection = change.selection
        if selection.source == "fallback" and self._controlled:
            self.fallbacks += 1
        if selection.source != "override":
            self._controlled = selection.source == "controller"
        self.in_force = selection
        # What a layer keeps is counted over all forwards of a phase. Counts of two budgets would
        # tell nothing about the thresholds of either, so with these corrected there is but one.
        self.calm = selection if self._drift is not None else calm_selection(selection)
        self._calm_below = calm_below(selection)
        self._obey(selection)
        if change.factors is not None:
            self.enforcement.set_threshold_factors(*change.factors)
        self.report(time.monotonic_ns())

    def _obey(self, selection: Selection) -> None:
        """Let the forwards from here on obey these budgets; those under way keep theirs."""
        self._obeyed = selection
        self.enforcement.set_budgets(selection.prefill_budget, selection.decode_budget)

    def begin_forward(self, phase: Phase, num_tokens: int, own: OwnBudgets | None = None) -> None:
        """Every rank, at the start of each forward of the served model.

        `own` tells the requests that have a budget of their own, if there are any.
        """
        now_ns = time.monotonic_ns()
        is_due = now_ns - self._reported_ns > REPORT_EVERY_NS
        if is_due:
            self.report(now_ns)  # before this forward is sampled: its layers are still to come
        if self._is_watching and self._unseen_layers[self._phase]:
            self._refuse_unseen_layers()
        self._phase, self._is_watching = phase, True
        # With thresholds corrected no step has the calm budgets, so none counts as calm.
        is_calm = (
            self._drift is None
            and self.requests_waiting == 0
            and self.requests_running < self._calm_below
        )
        selection = self.calm if is_calm else self.in_force
        if selection is not self._obeyed:
            self._obey(selection)
        token_budgets = None if own is None else self._token_budgets(phase, num_tokens, own)
        if self._drift is not None and token_budgets is not None:
            self._drift.discard(phase)
        self.enforcement.begin_forward(phase, num_tokens, token_budgets)
        if is_due and self._on_device is not None:
            self._on_device.ask_for_measurements()  # for the next report
        if self.model.device_type == "cpu":  # measuring reads tensors: never on an accelerator
            self.statistics.begin_forward(phase, num_tokens)
        self.tokens.add(phase, num_tokens, is_calm=is_calm)
        self.steps += 1
        if self._record is not None:
            self._record.add(self.steps, selection, phase, num_tokens, now_ns, is_calm=is_calm)

    def _token_budgets(
        self, phase: Phase, num_tokens: int, own: OwnBudgets
    ) -> npt.NDArray[np.int32] | None:
        selection = self._obeyed
        in_force = selection.prefill_budget if phase == "prefill" else selection.decode_budget
        try:
            budgets = budgets_of_tokens(own, in_force, num_tokens)
        except RequestBudgetError as error:
            if not self.own_budgets_ignored:
                logger.warning("sglang-alloc serves a forward at the budget in force: %s", error)
            self.count_ignored_budget()
            return None
        if budgets is not None:
            is_full = budgets == self.table.shape.budget_max
            is_above = budgets > in_force
            self.own_budget_tokens["full"] += int((is_above & is_full).sum())
            self.own_budget_tokens["floor"] += int((is_above & ~is_full).sum())
            self.own_budget_tokens["lower"] += int((budgets < in_force).sum())
        return budgets

    def count_ignored_budget(self) -> None:
        """Count a request that is served without the budget of its own that it asked for."""
        self.own_budgets_ignored += 1

    def begin_capture(self, phase: Phase) -> None:
        """Every rank: CUDA graphs that are captured from now on belong to this phase."""
        self._phase, self._is_watching = phase, False
        if self._on_device is not None:
            self._on_device.begin_capture(phase)

    def prepare(self, slots: RoutedSlots, max_tokens: int) -> None:
        """Every rank, before the server is ready: do ahead what first forwards would wait for."""
        if self._on_device is not None:
            self._on_device.prepare(slots, max_tokens)

    def route(self, layer_index: int, slots: RoutedSlots) -> RoutedSlots:
        """Apply the budget to one layer's routing."""
        self._unseen_layers[self._phase].discard(layer_index)
        kept = self.enforcement.drop(layer_index, slots)
        if self.statistics.samples_this_forward():
            self.statistics.observe(layer_index, slots, kept)
        return kept

    def route_logits(
        self, layer_index: int, router_logits: torch.Tensor, router: Router
    ) -> RoutedSlots:
        """Choose one layer's experts and apply the budget.

        router_logits: (T, E) float, on an accelerator.
        """
        assert self._on_device is not None, "plugin_routing.start refuses other devices"
        self._unseen_layers[self._phase].discard(layer_index)
        return self._on_device.route(layer_index, router_logits, router)

    def quotas(self, phase: Phase, budget: int) -> list[float]:
        """Return what the table means each MoE layer to keep per token at `budget`."""
        tables = enforcement_tables(self.table, self.mode)
        row = tables.quotas_of(phase)[budget - tables.budget_min]
        return [float(quota) for quota in row]

    def watch_layers(self) -> None:
        """From now on a forward in which a layer does not route here is noticed.

        Each phase must see a layer once: in a forward, or when its graphs are captured, for a
        replayed graph calls no layer.
        """
        self._unseen_layers = {phase: set(range(len(self.model.layer_ids))) for phase in PHASES}
        self._is_watching = False

    def has_seen(self, layer_index: int) -> bool:
        """Return whether the layer has routed here since the last `watch_layers`."""
        return any(layer_index not in unseen for unseen in self._unseen_layers.values())

    def _refuse_unseen_layers(self) -> None:
        unseen = sorted(self._unseen_layers[self._phase])
        names = ", ".join(str(self.model.layer_ids[index]) for index in unseen)
        raise UnsupportedServerError(
            f"after a whole forward of {self._phase}, the MoE layers {names} had not routed "
            "through SGLang's select_experts: this architecture chooses experts on a way of its "
            "own there, so the budget would not hold. Serve it without SGLANG_ALLOC_TABLE."
        )

    def report(self, now_ns: int) -> None:
        """Write this rank's counters to the shared table and its metrics to the engine's."""
        self._reported_ns = now_ns
        if self._on_device is not None:
            self.statistics.by_phase.update(self._on_device.measurements())
        self._slot.store(self._counters(now_ns), self.tokens.words())
        if self.metrics is not None:
            self.metrics.export(self)

    def close(self) -> None:
        """Let go of the table and the step record."""
        if self._record is not None:
            self._record.close()
        self.table.close()

    def _counters(self, now_ns: int) -> WorkerCounters:
        prefill, decode = (self.statistics.by_phase[phase] for phase in PHASES)
        masses = PhaseStatistics(
            mass=prefill.mass + decode.mass, kept_mass=prefill.kept_mass + decode.kept_mass
        )
        return WorkerCounters(
            pid=os.getpid(),
            rank=self.model.rank,
            acknowledged_generation=self.in_force.generation,
            acknowledged_source=source_code(self.in_force.source),
            prefill_budget=self.in_force.prefill_budget,
            decode_budget=self.in_force.decode_budget,
            steps=self.steps,
            fallbacks=self.fallbacks,
            sampled_prefill_tokens=prefill.tokens,
            sampled_prefill_activations=prefill.activations,
            sampled_decode_tokens=decode.tokens,
            sampled_decode_activations=decode.activations,
            sampled_decode_steps=decode.sampled_forwards,
            distinct_experts=decode.distinct_experts,
            last_step_ns=now_ns,
            kept_mass_millionths=round((masses.kept_mass_ratio() or 0.0) * 1e6),
        )


def check_fits(table: SharedTable, model: ServedModel) -> None:
    """Raise ModelMismatchError when the table was made for another model than `model`."""
    shape = table.shape
    found = {
        "MoE layers": (shape.num_layers, len(model.layer_ids)),
        "top-k": (shape.top_k, model.top_k),
        "experts": (shape.num_experts, model.num_experts),
        "MoE layer ids": (tuple(int(i) for i in table.layer_ids), model.layer_ids),
        "model fingerprint": (table.fingerprint, model.fingerprint),
    }
    wrong = [
        f"{what}: table {ours}, model {theirs}"
        for what, (ours, theirs) in found.items()
        if ours != theirs
    ]
    if wrong:
        raise ModelMismatchError(
            f"the budget table was made for {table.model_id!r} and does not fit the served model "
            f"{model.name!r} ({'; '.join(wrong)}). Publish a table made for this model."
        )


def make_enforcement(
    table: SharedTable,
    mode: Mode,
    device_type: str,
    profile_record: Path | None = None,
    recorders: ProbeRecorders = NO_RECORDERS,
) -> Enforcement:
    """Build the enforcement of a device, or raise UnsupportedServerError for what it cannot do.

    A table of probes gets its own, which writes to the folder `profile_record` unless it is None,
    and is told by `recorders` what they observe.
    """
    tables = enforcement_tables(table, mode)
    if probe_of_note(table.mode_note) is not None:
        return ProbeEnforcement(tables, probe_rows(table), device_type, profile_record, recorders)
    if device_type == "cpu":
        return HostEnforcement(tables)
    return DeviceEnforcement(tables, torch.device(device_type))
