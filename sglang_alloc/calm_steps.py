"""Data story, step 7: which steps are calm, and how many tokens they served.

A step is calm when its batch leaves no request waiting in the scheduler's queue and fewer requests
run than the controller says. What it loses in speed costs few people little, so the controller may
give it larger budgets than the others.
"""

from __future__ import annotations

from sglang_alloc.allocation_mode import PHASES, Phase
from sglang_alloc.shared_table import CalmTokens, Selection
from sglang_alloc.shared_table_words import RUNNING_ANY


def calm_selection(selection: Selection) -> Selection:
    """Return what calm steps obey while `selection` is in force, which may be itself."""
    if selection.calm is None:
        return selection
    prefill_budget, decode_budget, _ = selection.calm
    return selection._replace(prefill_budget=prefill_budget, decode_budget=decode_budget)


def calm_below(selection: Selection) -> int:
    """Return from how many running requests on no step is calm."""
    return RUNNING_ANY if selection.calm is None else selection.calm.running_requests


class ServedTokens:
    """Tokens of all forwards so far, by phase: in calm steps, and in all others."""

    def __init__(self) -> None:
        self.calm: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self.other: dict[Phase, int] = dict.fromkeys(PHASES, 0)

    def add(self, phase: Phase, num_tokens: int, *, is_calm: bool) -> None:
        """Count the tokens of one forward."""
        counts = self.calm if is_calm else self.other
        counts[phase] += num_tokens

    def words(self) -> CalmTokens:
        """Return the counts as the shared table has them."""
        totals = {phase: self.calm[phase] + self.other[phase] for phase in PHASES}
        return CalmTokens(
            self.calm["prefill"], totals["prefill"], self.calm["decode"], totals["decode"]
        )
