"""Data story: the budget on an accelerator, valid inside captured CUDA graphs.

A captured graph reads tensors at fixed addresses, never a Python number: a change of budget or
phase is one copy on the device before the forward, and no graph is captured again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_alloc.allocation_mode import PHASES, Phase
from sglang_alloc.device_bounds import DeviceBounds
from sglang_alloc.device_rows import DeviceRows
from sglang_alloc.device_totals import DeviceTotals
from sglang_alloc.enforcement import EnforcementTables, RoutedSlots
from sglang_alloc.threshold_drift import Kept
from sglang_alloc.worker_statistics import PhaseStatistics
from sglang_alloc_kernels.budgeted_routing import Router
from sglang_alloc_kernels.layer_rows import LayerRows, StepTensors
from sglang_alloc_kernels.slot_rules import KERNELS, SlotRules

NO_PADDING = 2**31 - 1  # as many valid rows as there may be


class DeviceEnforcement:
    """Drops slots by Triton kernels, in every mode, without waiting for the device.

    `rules` are the kernels, or their torch twins where nothing can run kernels. Which rule a mode
    has in which phase is settled when a graph is captured (`begin_capture`), everything else when
    it runs.
    """

    def __init__(
        self, tables: EnforcementTables, device: torch.device, rules: SlotRules = KERNELS
    ) -> None:
        self._tables = tables
        self._rules = rules
        self._num_layers = tables.decode.quotas.shape[1]
        self._rows = DeviceRows(tables, device)
        self._totals = DeviceTotals(self._num_layers, tables.num_experts, device)
        self._num_valid = torch.full((1,), NO_PADDING, dtype=torch.int32, device=device)
        self._num_tokens = NO_PADDING
        self._bounds = DeviceBounds(tables, device)
        self._budgets = {"prefill": tables.budget_max, "decode": tables.budget_max}
        self._phase: Phase = "decode"
        self._serving = False

    def set_budgets(self, prefill_budget: int, decode_budget: int) -> None:
        self._budgets = {"prefill": prefill_budget, "decode": decode_budget}

    def set_threshold_factors(self, prefill: Sequence[float], decode: Sequence[float]) -> None:
        self._rows.set_limit_factors({"prefill": prefill, "decode": decode})

    def begin_capture(self, phase: Phase) -> None:
        """Graphs captured from now on, until a forward begins, are those of this phase."""
        self._phase = phase
        self._rows.load(phase, self._budgets[phase])

    def begin_forward(
        self,
        phase: Phase,
        num_tokens: int | None = None,
        token_budgets: np.ndarray | None = None,
    ) -> None:
        self.begin_capture(phase)
        self._bounds.load(token_budgets, self._budgets[phase])
        self._set_valid(NO_PADDING if num_tokens is None else num_tokens)
        if num_tokens is not None and not self._serving:
            self._serving = True
            self._totals.clear()

    def drops_slots(self) -> bool:
        return True  # the host cannot know what a replayed graph reads

    def addresses(self) -> tuple[int, ...]:
        """Return the addresses that captured graphs read rows, valid rows, bounds and sums from."""
        return (
            self._rows.address(),
            self._num_valid.data_ptr(),
            *(tensor.data_ptr() for tensor in self._bounds.of(1)),
            *(tensor.data_ptr() for tensor in self._totals.sums),
        )

    def drop(self, layer_index: int, slots: RoutedSlots) -> RoutedSlots:
        mode, rule = self._tables.mode_of(self._phase), self._tables.rule_of(self._phase)
        given = (slots.weights, slots.ids, self._rows.of(self._phase), layer_index)
        bounds = self._bounds.of(len(slots.ids))
        step = StepTensors(self._num_valid, *bounds, self._totals.sums)
        named = {"num_shared": slots.num_shared, "step": step}
        if mode == "union":
            weights, ids = self._rules.union(*given, self._tables.num_experts, rule, **named)
        elif mode == "token":
            weights, ids = self._rules.token(*given, **named)
        else:
            weights, ids = self._rules.budgeted(*given, rule, **named)
        self._end_layer(layer_index)
        return RoutedSlots(weights, ids, slots.num_shared)

    def route(self, layer_index: int, router_logits: torch.Tensor, router: Router) -> RoutedSlots:
        """Choose a layer's experts and drop what the budget does not hold.

        router_logits: (T, E) float. One launch; in modes `token` and `union`, which need the slots
        of all tokens first, one more than `drop`.
        """
        rows = self._rows.of(self._phase)
        if self._tables.mode_of(self._phase) in {"token", "union"}:
            slots = self._rules.routing(
                *(router_logits, router, LayerRows(rows.limits), layer_index, "all"),
                step=StepTensors(self._num_valid),
            )
            return self.drop(layer_index, RoutedSlots(*slots, 0))
        bounds = self._bounds.of(len(router_logits))
        weights, ids = self._rules.routing(
            *(router_logits, router, rows, layer_index, self._tables.rule_of(self._phase)),
            step=StepTensors(self._num_valid, *bounds, self._totals.sums),
        )
        self._end_layer(layer_index)
        return RoutedSlots(weights, ids, 0)

    def _end_layer(self, layer_index: int) -> None:
        if layer_index == self._num_layers - 1:
            self._totals.add_step(self._rules, self._rows.phase_number)

    def prepare(self, slots: RoutedSlots, max_tokens: int) -> None:
        """Compile ahead what batches up to `max_tokens` rows would wait for, slots like these.

        Kernels are compiled for powers of two of rows, up to the first that holds them all. What
        this counts is forgotten when the first forward begins.
        """
        for phase in PHASES:
            self.begin_capture(phase)
            num_tokens = 1
            while num_tokens < 2 * max_tokens:
                row = (slots.weights[:1], slots.ids[:1])
                weights, ids = (part.repeat(num_tokens, 1) for part in row)
                self.drop(self._num_layers - 1, RoutedSlots(weights, ids, slots.num_shared))
                num_tokens *= 2
        self.begin_capture("decode")

    def ask_for_measurements(self) -> None:
        """Start to fetch what routing did, behind what the current stream has yet to do."""
        self._totals.ask()

    def kept_by_layer(self) -> dict[Phase, Kept]:
        """Return the tokens and each layer's kept slots of the same copy."""
        return self._totals.kept_by_layer()

    def measurements(self) -> dict[Phase, PhaseStatistics]:
        """Return what was fetched last, by phase; empty before anything was. Never waits."""
        return self._totals.by_phase()

    def _set_valid(self, num_tokens: int) -> None:
        """Declare rows from `num_tokens` on to be padding of a captured batch."""
        if num_tokens != self._num_tokens:
            self._num_valid.fill_(num_tokens)
            self._num_tokens = num_tokens
