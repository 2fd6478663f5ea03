"""Data story: what an implementation of the budget must do inside one worker process.

`enforcement_host.py` serves eager CPU execution, `enforcement_device.py` accelerators and graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sglang_alloc.allocation_mode import Mode, Phase

# What profiling and calibration rank by saliency; the other modes' are made with plain weights.
RANKED_BY_SALIENCY = ("threshold", "union")


class RoutedSlots(NamedTuple):
    """What the router chose: weights (T, K) float and ids (T, K) int, routed columns first.

    `num_shared` trailing columns belong to shared experts and are never dropped.
    """

    weights: torch.Tensor
    ids: torch.Tensor
    num_shared: int


class PhaseRows(NamedTuple):
    """The table's rows of one phase, (N, L) each; absent ones are None.

    quotas: int; thresholds and gains: float; references: int, how many best slots (and those kept)
    the kept weights are normalised by: top-k and above change nothing (arXiv 2609.04575);
    mean_quotas: float, how many slots the thresholds were calibrated to keep. In mode `union` of
    decode the thresholds say which slots open the set; where there are none, the best `quotas` of
    each token do.
    """

    quotas: np.ndarray
    thresholds: np.ndarray | None
    gains: np.ndarray | None
    references: np.ndarray | None = None
    mean_quotas: np.ndarray | None = None


class EnforcementTables(NamedTuple):
    """Everything an implementation reads; arrays are views into the shared table.

    `mode` is decode's; prefill obeys `prefill_mode`, or `mode` where that is None.
    """

    mode: Mode
    top_k: int
    budget_min: int
    budget_max: int
    prefill: PhaseRows
    decode: PhaseRows
    saliency: np.ndarray | None  # (L, E), mean output norm of each expert
    num_experts: int = 0  # E
    prefill_mode: Mode | None = None

    def mode_of(self, phase: Phase) -> Mode:
        """Return the mode that a phase obeys."""
        return self.mode if phase == "decode" else self.prefill_mode or self.mode

    def quotas_of(self, phase: Phase) -> np.ndarray:
        """Return the slots per token that each layer is meant to keep, (N, L).

        In mode `threshold` that is the mean its thresholds were calibrated to; in `union` the
        slots that open the set, on which others ride.
        """
        rows = self.decode if phase == "decode" else self.prefill
        if self.mode_of(phase) == "threshold" and rows.mean_quotas is not None:
            return rows.mean_quotas
        return rows.quotas

    def ranks_by_saliency(self, phase: Phase) -> bool:
        """Return whether a phase ranks a token's slots by weight times saliency, not by weight.

        One order for everything that asks for best slots: those that stay, those of a reference,
        and those under a ceiling.
        """
        return self.saliency is not None and self.mode_of(phase) in RANKED_BY_SALIENCY

    def rule_of(self, phase: Phase) -> Literal["quota", "threshold"]:
        """Return what the phase's slots are compared with: a quota of best ones, or a score."""
        mode = self.mode_of(phase)
        if mode == "union":
            return "quota" if self.decode.thresholds is None else "threshold"
        return "threshold" if mode == "threshold" else "quota"


class Enforcement(Protocol):
    """Applies the budget in force to the slots of each MoE layer."""

    def set_budgets(self, prefill_budget: int, decode_budget: int) -> None:
        """Take the budgets, in activations per token, that the following forwards obey."""

    def set_threshold_factors(self, prefill: Sequence[float], decode: Sequence[float]) -> None:
        """Multiply the calibrated thresholds of each layer by these from the next forward on."""

    def begin_forward(
        self,
        phase: Phase,
        num_tokens: int | None = None,
        token_budgets: np.ndarray | None = None,
    ) -> None:
        """Start a forward of the served model in this phase.

        Rows from `num_tokens` on are padding of a captured batch; None where there is none.
        token_budgets: (T,) int, the budget of each token where requests have their own.
        """

    def drops_slots(self) -> bool:
        """Return whether the forward under way may hold dropped slots."""

    def drop(self, layer_index: int, slots: RoutedSlots) -> RoutedSlots:
        """Return the slots of a layer with those beyond the budget dropped.

        May be recorded once, into a CUDA graph, and replayed under other budgets: on a device it
        must read the budget from tensors alone. Returns the same object where nothing is dropped.
        """
