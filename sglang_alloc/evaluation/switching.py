"""Offline story, judging: what a change of budget in mid-sequence does to what follows.

The keys and values of the tokens before the change were made at another budget and stay.
"""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from sglang_alloc.evaluation.jobs import Job
from sglang_alloc.evaluation.material import Material
from sglang_alloc.evaluation.points import Point, rounded
from sglang_alloc.evaluation.rules import Subject, served_threshold
from sglang_alloc.evaluation.step_rules import switched
from sglang_alloc.evaluation.text_measures import ROWS_PER_PASS
from sglang_alloc.reference.model import Allocation

SWITCH_POSITIONS = (64, 192, 384)
SOON_TOKENS = 32  # right behind the change


def switching_jobs(subject: Subject, material: Material, budgets: tuple[int, ...]) -> list[Job]:
    """A job per position and pair of budgets; pairs of equal ones are the sequences that stay."""
    return [
        _job(subject, material, before, after, at)
        for at, before, after in product(SWITCH_POSITIONS, budgets, budgets)
    ]


def switch_name(before: int, at: int) -> str:
    """The rule name of a point: its budget is the one after the change."""
    return f"switch from {before} at {at}"


def _job(subject: Subject, material: Material, before: int, after: int, at: int) -> Job:
    name = switch_name(before, at)

    def measure() -> Point:
        steps = material.windows.shape[1] - 1
        rule = switched(_rule(subject, before), _rule(subject, after), at, steps)
        late = tail_losses(subject, material, rule, at)
        samples = {"rest": late.mean(1), "soon": late[:, :SOON_TOKENS].mean(1)}
        return Point(name, after, 0.0, {}, rounded(samples))

    return Job(name, after, measure)


def _rule(subject: Subject, budget: int) -> Allocation | None:
    full = budget == subject.tables.budget_max
    return None if full else served_threshold(subject, budget)


@torch.no_grad()
def tail_losses(subject: Subject, material: Material, rule: Allocation, at: int) -> Tensor:
    """Losses (W, S - at) of what the positions from `at` on say of their successors."""
    losses = []
    for part in torch.split(material.windows, ROWS_PER_PASS):
        logits = subject.model(part[:, :-1], rule).logits[:, at:].transpose(1, 2)
        losses.append(functional.cross_entropy(logits, part[:, 1 + at :], reduction="none"))
    return torch.cat(losses).double()
