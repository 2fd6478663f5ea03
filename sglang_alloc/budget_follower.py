"""Data story, steps 3 and 4: the leading rank reads the selector, every rank applies the change.

The leading rank alone looks at the shared table. What it sees travels with the engine's own request
broadcast, so that all ranks of a tensor-parallel group switch before the same batch: partial sums
of different quotas would not add up.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_alloc.shared_table import Fallback, Selection, SharedTable
from sglang_alloc.threshold_drift import Factors


@dataclass(frozen=True)
class BudgetChange:
    """A selection on its way to every rank, as one element of the broadcast request list.

    `rule` names what the budgets mean on the rank that sent them: table contents and mode.
    `factors` are new corrections of the thresholds, None where those stay as they are.
    """

    selection: Selection
    rule: str
    factors: Factors | None = None


class BudgetFollower:
    """Tells when the selection of a shared table differs from the one last announced."""

    def __init__(
        self, table: SharedTable, rule: str, stale_after_seconds: float, fallback: Fallback
    ) -> None:
        self._table = table
        self.rule = rule
        self._stale_after_ns = int(stale_after_seconds * 1e9)
        self._fallback = fallback
        self._announced: Selection | None = None

    def poll(self, now_ns: int) -> BudgetChange | None:
        """Return the change to announce, or None. Costs about a microsecond, takes no lock."""
        selection = self._table.selection(now_ns, self._stale_after_ns, self._fallback)
        if selection == self._announced:
            return None
        self._announced = selection
        return BudgetChange(selection, self.rule)
