"""Offline story, judging: how far a request's output depends on the requests it is batched with.

Each request is decoded twice, in two batches that share nothing but it. Everything is computed in
double precision, where the arithmetic of a batch of another content differs by about 1e-13: what
is larger comes from the rule.
"""

import copy
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_alloc.evaluation.generation import agreed_share, greedy_continuations
from sglang_alloc.evaluation.jobs import Job
from sglang_alloc.evaluation.material import Material
from sglang_alloc.evaluation.points import Point, rounded
from sglang_alloc.evaluation.rules import (
    Builder,
    Subject,
    served_layer,
    served_threshold,
    served_token,
)
from sglang_alloc.evaluation.step_rules import by_step
from sglang_alloc.reference.model import Allocation, ReferenceModel
from sglang_alloc.reference.union_sets import served_union

BATCH = 8
STEPS, NEW_TOKENS = 192, 32


class Crowd(NamedTuple):
    """A model in double precision, windows (W, S + 1), and how many of them are looked at."""

    model: ReferenceModel
    windows: Tensor
    requests: int


def neighbour_jobs(
    subject: Subject, material: Material, budgets: tuple[int, ...], requests: int
) -> list[Job]:
    """A job per rule and budget, and one at full budget as the control."""
    crowd = Crowd(copy.deepcopy(subject.model).double(), material.windows[:, : STEPS + 1], requests)
    wanted = [("full", subject.tables.budget_max), *product(STEP_RULES, budgets)]
    return [_job(subject, crowd, name, budget) for name, budget in wanted]


def neighbour_name(rule: str) -> str:
    """The rule name of a point."""
    return f"neighbours under {rule}"


def _job(subject: Subject, crowd: Crowd, name: str, budget: int) -> Job:
    def measure() -> Point:
        make = STEP_RULES.get(name)
        rule = None if make is None else make(subject, budget)
        samples = dependence(crowd, rule)
        return Point(neighbour_name(name), budget, 0.0, {}, rounded(samples))

    return Job(neighbour_name(name), budget, measure)


@torch.no_grad()
def dependence(crowd: Crowd, rule: Allocation | None) -> dict[str, Tensor]:
    """Compare requests in two batches each, under a step's rule.

    Returns by request: `kl` between the two next-token distributions in nats, `changed`, the share
    of steps whose most likely token differs, `logit`, the largest difference of any logit, and
    `unlike`, the share of a greedy continuation that comes after the first different token.
    """
    model, windows, requests = crowd
    columns: dict[str, list[float]] = {"kl": [], "changed": [], "logit": [], "unlike": []}
    for request in range(requests):
        batches = [_batch(windows, request, shift) for shift in (0, 1)]
        steps = windows.shape[1] - 1
        first, second = (
            model(batch[:, :-1], None if rule is None else by_step(rule, steps)).logits[0]
            for batch in batches
        )
        logs = first.log_softmax(-1), second.log_softmax(-1)
        columns["kl"].append(float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()))
        columns["changed"].append(float((first.argmax(-1) != second.argmax(-1)).double().mean()))
        columns["logit"].append(float((first - second).abs().max()))
        columns["unlike"].append(_unlike(model, batches, rule))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


def _batch(windows: Tensor, request: int, shift: int) -> Tensor:
    """BATCH rows, the request first; another `shift` gives other neighbours."""
    others = [(request + 1 + shift * (BATCH - 1) + i) % len(windows) for i in range(BATCH - 1)]
    return windows[[request, *others]]


def _unlike(model: ReferenceModel, batches: list[Tensor], rule: Allocation | None) -> float:
    prompts = [batch[:, : STEPS // 2] for batch in batches]
    # Prefill at full budget: what differs then comes from decode.
    first, second = (
        greedy_continuations(model, prompt, NEW_TOKENS, None, rule) for prompt in prompts
    )
    return 1.0 - float(agreed_share(first[:1], second[:1])[0])


def _union(subject: Subject, budget: int) -> Allocation:
    return served_union(subject.tables, budget, subject.saliency.double(), BATCH, steps=1)


STEP_RULES: dict[str, Builder] = {
    "layer": served_layer,
    "threshold": served_threshold,
    "token": served_token,
    "union": _union,
}
