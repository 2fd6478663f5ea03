"""Demo, step 5: the budgets that requests were served at, from the steps that made their tokens.

Calm steps, which leave no request waiting, obey larger budgets than the others. So the budgets that
the server acknowledged do not tell what a request got; its steps do. Pure arithmetic.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sglang_alloc.allocation_mode import PHASES, Phase
from sglang_alloc.demo.observation import BudgetInForce, RunRecord
from sglang_alloc.server_runs.errors import ServerRunError
from sglang_alloc.server_runs.served_steps import Step


class ServedBudgets(NamedTuple):
    """The budgets that one request was served at: in prefill, and for each token after the first.

    The first token comes from the prefill.
    """

    prefill_budget: int
    decode_budgets: tuple[int, ...]
    prompt_tokens: int

    @property
    def output_tokens(self) -> int:
        return 1 + len(self.decode_budgets)

    @property
    def decode_budget(self) -> float:
        """The mean over the tokens after the first; without any, the prefill budget."""
        return float(statistics.fmean(self.decode_budgets or (self.prefill_budget,)))


def served_budgets(run: RunRecord) -> list[ServedBudgets]:
    """Return the budgets of each answered request.

    SGLang hands out the tokens of a step when the one after it is over, because it prepares a step
    while the one before runs (its overlap schedule). So the prefill step of a request is the last
    one whose next step was more than half over when the first token came. Every decode step serves
    all running requests: those that follow the prefill step made the later tokens, one each.

    Raises:
        ServerRunError: a request was answered that no prefill step of the record can have served.
    """
    prefills = _Prefills(run.steps)
    decodes = [step for step in run.steps if step.phase == "decode"]
    begins = [step.begun_seconds for step in decodes]
    served = []
    for request in run.requests:
        if request.first_token_second is None:
            continue
        prefill = prefills.of_first_token(request.first_token_second)
        first = bisect.bisect_right(begins, prefill.begun_seconds)
        later = decodes[first : first + request.output_tokens - 1]
        budgets = tuple(step.budget for step in later)
        served.append(ServedBudgets(prefill.budget, budgets, request.prompt_tokens))
    return served


class _Prefills:
    """Prefill steps, by the time from which on their first tokens may have come."""

    def __init__(self, steps: Sequence[Step]) -> None:
        begins = [step.begun_seconds for step in steps]
        numbered = [(number, step) for number, step in enumerate(steps) if step.phase == "prefill"]
        self._steps = [step for _, step in numbered]
        self._seconds = [
            statistics.fmean(begins[number + 1 : number + 3] or begins[number:])
            for number, _ in numbered
        ]

    def of_first_token(self, second: float) -> Step:
        position = bisect.bisect_right(self._seconds, second) - 1
        if position < 0:
            raise ServerRunError(
                f"a first token came at second {second:.2f} of a run, and the server's step record "
                "has no prefill step before it: did the disk fill up? The server's log tells more"
            )
        return self._steps[position]


def summarise_steps(steps: Sequence[Step]) -> dict[str, Any]:
    """Return, by phase, the share of tokens in calm steps and the mean budgets in both kinds.

    A prefill step has as many tokens as the prompts that it reads, a decode step one a request. A
    mean over no tokens is NaN.
    """
    of_phase = {phase: [step for step in steps if step.phase == phase] for phase in PHASES}
    calm = {phase: [step for step in of_phase[phase] if step.is_calm] for phase in PHASES}
    busy = {phase: [step for step in of_phase[phase] if not step.is_calm] for phase in PHASES}
    return {
        "calm_tokens_ratio": {p: _ratio(_tokens(calm[p]), _tokens(of_phase[p])) for p in PHASES},
        "mean_budget_in_busy_steps": {p: mean_budget(busy[p]) for p in PHASES},
        "mean_budget_in_calm_steps": {p: mean_budget(calm[p]) for p in PHASES},
    }


class BudgetsFrom(NamedTuple):
    """From `second` on, what busy steps and what calm steps of one phase obeyed."""

    second: float
    busy: int
    calm: int


def budget_timeline(run: RunRecord, phase: Phase, end_second: float) -> list[BudgetsFrom]:
    """Return the budgets of busy and of calm steps at each change of either, and at the end."""
    changes = [(entry.second, False, _budget_of(entry, phase)) for entry in run.budgets]
    changes += [(entry.second, True, _budget_of(entry, phase)) for entry in run.calm_budgets]
    timeline: list[BudgetsFrom] = []
    busy = calm = 0
    for second, group in itertools.groupby(sorted(changes), key=lambda change: change[0]):
        for _, is_calm, budget in group:
            busy, calm = (busy, budget) if is_calm else (budget, calm)
        if not timeline or timeline[-1][1:] != (busy, calm):
            timeline.append(BudgetsFrom(max(second, 0.0), busy, calm))
    return [*timeline, BudgetsFrom(end_second, busy, calm)]


def _budget_of(entry: BudgetInForce, phase: Phase) -> int:
    return entry.prefill_budget if phase == "prefill" else entry.decode_budget


def mean_budget_by_second(run: RunRecord, phase: Phase) -> list[tuple[float, float]]:
    """Return (middle of the second, mean budget over its tokens), where a step of `phase` began."""
    seconds: dict[int, list[Step]] = defaultdict(list)
    for step in run.steps:
        if step.phase == phase:
            seconds[int(step.begun_seconds)].append(step)
    return [(second + 0.5, mean_budget(seconds[second])) for second in sorted(seconds)]


def mean_budget(steps: Iterable[Step]) -> float:
    """Return the mean budget over the tokens of `steps`; NaN for none."""
    weighted = [(step.budget * step.tokens, step.tokens) for step in steps]
    return _ratio(sum(budgets for budgets, _ in weighted), sum(tokens for _, tokens in weighted))


def _tokens(steps: Iterable[Step]) -> int:
    return sum(step.tokens for step in steps)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
