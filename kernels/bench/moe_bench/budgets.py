"""Bench, what is put in force: rows of a mode at a fraction of the full budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from moe_bench.shapes import MoEShape
from sglang_alloc_kernels.layer_rows import LayerRows, StepTensors
from sglang_alloc_kernels.slot_rules import SlotRules

MODES = ("layer", "threshold", "token", "union")
FRACTIONS = {"full": 1.0, "5/6": 5 / 6, "2/3": 2 / 3, "1/2": 1 / 2, "1/3": 1 / 3}

Slots = tuple[torch.Tensor, torch.Tensor]  # weights (T, K), ids (T, K)


class Rule(NamedTuple):
    """A mode at a budget: `drop` maps routed slots to kept ones, by the kernels or their twins.

    kind: what the limits in `rows` are, for a kernel that asks: `threshold` or `quota`.
    """

    kind: str
    rows: LayerRows
    drop: Callable[[torch.Tensor, torch.Tensor, StepTensors], Slots]


class Budget(NamedTuple):
    """The share of slots that a rule keeps; of `union`, the share that opens its set.

    cap_share: in `union`, its cap as a share of the experts. counts_riders: in `union`, the share
    is of what it keeps in all, so that modes are compared at equal measured activations.
    """

    fraction: float
    cap_share: float | None = None
    counts_riders: bool = False


def budgets_of(mode: str) -> dict[str, Budget]:
    """Return by name the budgets at which a mode's layers are measured.

    `union` also where half of all slots stay, and where each token's best slot alone opens the
    set, without and with a cap up to which the heaviest candidates fill it.
    """
    budgets = {name: Budget(fraction) for name, fraction in FRACTIONS.items()}
    if mode == "union":
        budgets |= {
            "1/2 kept": Budget(0.5, counts_riders=True),
            "top-1": Budget(0.0),
            "top-1, cap 3/4": Budget(0.0, 0.75),
        }
    return budgets


def make_rule(shape: MoEShape, mode: str, budget: Budget, slots: Slots, rules: SlotRules) -> Rule:
    """Return the rule of a mode that keeps about the budget's share of the slots (T, K) given.

    `layer` keeps a whole number per token; `token` that share exactly; `threshold` takes the
    threshold that keeps that share of these very slots. `union` opens its set with a whole number
    of each token's best slots, so what it keeps is more; where its riders count, it opens by the
    lowest threshold that keeps no more than the share, or as little as it can.
    """
    quota = max(1.0, budget.fraction * shape.top_k)
    kind = "threshold" if mode == "threshold" or budget.counts_riders else "quota"
    if budget.counts_riders:
        limit = _opening_threshold(shape, slots, quota, rules)
    elif mode in {"layer", "union"}:
        limit = float(max(1, round(quota)))
    elif mode == "threshold":
        limit = _threshold(slots[0], quota)
    else:
        limit = quota
    rows = LayerRows(_one(limit, slots))
    if budget.cap_share is not None:
        rows = rows._replace(caps=_one(round(budget.cap_share * shape.num_experts), slots))

    def drop(weights: torch.Tensor, ids: torch.Tensor, step: StepTensors) -> Slots:
        if mode == "union":
            return rules.union(weights, ids, rows, 0, shape.num_experts, kind, step=step)
        if mode == "token":
            return rules.token(weights, ids, rows, 0, step=step)
        return rules.budgeted(weights, ids, rows, 0, kind, step=step)

    return Rule(kind, rows, drop)


def _one(value: float, slots: Slots) -> torch.Tensor:
    """Return a row for one layer, on the device of the slots."""
    return torch.tensor([value], dtype=torch.float32, device=slots[0].device)


def _opening_threshold(shape: MoEShape, slots: Slots, quota: float, rules: SlotRules) -> float:
    """Return the lowest weight from which slots may open the set and `quota` per token be kept.

    The higher the threshold, the smaller the set. Infinity, with which each token's best slot alone
    opens it, where even the best but those keep more.
    """
    weights = slots[0].float().flatten().sort().values
    levels: list[float] = [*weights.tolist(), float("inf")]
    first, last = 0, len(levels) - 1
    while first < last:
        middle = (first + last) // 2
        rows = LayerRows(_one(levels[middle], slots))
        kept = rules.union(*slots, rows, 0, shape.num_experts, "threshold")[1] >= 0
        if int(kept.sum()) <= quota * len(kept):
            last = middle
        else:
            first = middle + 1
    return levels[first]


def _threshold(weights: torch.Tensor, quota: float) -> float:
    """Return the weight above which `quota` slots per token lie; a token's best always stays."""
    best = weights.float().sort(dim=1, descending=True).values
    others = best[:, 1:].flatten().sort(descending=True).values
    wanted = round((quota - 1) * len(weights))
    if wanted >= len(others):
        return float("-inf")
    return float(others[wanted]) * (1 + 1e-6)
