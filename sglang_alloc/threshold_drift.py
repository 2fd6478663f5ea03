"""Data story, aside: a slow correction of thresholds that have drifted from what they should keep.

Thresholds are calibrated to keep a layer's quota on average. Where traffic differs from the
calibration text, they keep more or less. The leading rank measures the mean m that a layer keeps
under quota q, and after every `WINDOW_TOKENS` measured tokens of one budget sets

    c <- clip(c + RATE * (m / q - 1), -LIMIT, LIMIT),    threshold in force = calibrated * exp(c)

with one c for each layer and phase, whatever the budget. A threshold moved by 1 % moves m by 0.3 to
2 %, so the loop is stable, and an error shrinks to a tenth within 5 to 30 windows. Layers that keep
one slot or all of them have nothing to correct, and a full budget is never measured. A window in
which requests had budgets of their own is not used.

All ranks take the factors with the broadcast of budgets, before the same batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_alloc.allocation_mode import PHASES, Phase
from sglang_alloc.enforcement import EnforcementTables

WINDOW_TOKENS = 4096  # a mean over so many is good to about 1 %
RATE = 0.25
LIMIT = float(np.log(2.0))

Vector = npt.NDArray[np.float64]
Factors = tuple[tuple[float, ...], tuple[float, ...]]  # of each layer, in the order of PHASES


class Kept(NamedTuple):
    """What a phase has kept since the start: measured tokens, and slots by layer (L,)."""

    tokens: int
    slots: Vector


class _Window(NamedTuple):
    budget: int
    begun: Kept
    settled: bool


class ThresholdDrift:
    """The corrections of all layers and phases, on the leading rank."""

    def __init__(self, tables: EnforcementTables, *, delayed: bool) -> None:
        """`delayed`: measurements may still hold forwards from before the last change of budget."""
        rows = {"prefill": tables.prefill, "decode": tables.decode}
        self._quotas = {phase: rows[phase].mean_quotas for phase in PHASES}
        self._tables = tables
        self._delayed = delayed
        layers = tables.decode.quotas.shape[1]
        self._logs = {phase: np.zeros(layers) for phase in PHASES}
        self._windows: dict[Phase, _Window] = {}

    def factors(self) -> Factors:
        """Return the factors on the thresholds, by phase and layer."""
        prefill, decode = (tuple(np.exp(self._logs[phase]).tolist()) for phase in PHASES)
        return prefill, decode

    def observe(self, phase: Phase, budget: int, kept: Kept) -> bool:
        """Take what was measured so far under `budget`; return whether the factors changed."""
        if self._quotas[phase] is None:
            return False
        window = self._windows.get(phase)
        if window is None or window.budget != budget:
            self._windows[phase] = _Window(budget, kept, settled=not self._delayed)
            return False
        tokens = kept.tokens - window.begun.tokens
        if not window.settled and tokens > 0:
            self._windows[phase] = _Window(budget, kept, settled=True)
            return False
        if tokens < WINDOW_TOKENS or budget == self._tables.budget_max:
            return False
        self._windows[phase] = window._replace(begun=kept)
        return self._correct(phase, budget, (kept.slots - window.begun.slots) / tokens)

    def discard(self, phase: Phase) -> None:
        """Forget the window under way: a forward began in which some had another budget."""
        self._windows.pop(phase, None)

    def _correct(self, phase: Phase, budget: int, means: Vector) -> bool:
        table = self._quotas[phase]
        assert table is not None
        quotas = np.asarray(table[budget - self._tables.budget_min], np.float64)
        adjustable = (quotas > 1.0) & (quotas < self._tables.top_k)
        step = np.where(adjustable, RATE * (means / quotas - 1.0), 0.0)
        before = self._logs[phase]
        self._logs[phase] = np.clip(before + step, -LIMIT, LIMIT)
        return bool((self._logs[phase] != before).any())
