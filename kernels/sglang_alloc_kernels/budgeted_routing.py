"""Modes `layer` and `threshold` from the router's logits on: scores, top-K, budget, one launch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from sglang_alloc_kernels.budgeted_slots import Rule, budgeted_slots_torch
from sglang_alloc_kernels.drop_slots import DROPPED
from sglang_alloc_kernels.layer_rows import NO_STEP_TENSORS, LayerRows, StepTensors

# Keeps a row of zero weights from dividing by zero, as SGLang's routing does.
SMALLEST_MASS = 1e-20


class Router(NamedTuple):
    """How a model routes: what is fixed when it is loaded.

    scoring: how logits become scores. num_groups, top_groups: experts are in `num_groups` groups of
    equal size, of which a token uses the best `top_groups` (1, 1: no groups). A group's score is
    its best expert's, or, with a correction bias, the sum of its two best. renormalize: weights of
    the K slots sum to 1. scaling: factor on the weights after that (`routed_scaling_factor`).
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    top_groups: int = 1
    scaling: float = 1.0


def budgeted_routing_torch(
    router_logits: torch.Tensor,
    router: Router,
    rows: LayerRows,
    layer_index: int,
    rule: Rule,
    *,
    correction_bias: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    step: StepTensors = NO_STEP_TENSORS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route the tokens of one layer under its budget; return (weights, ids).

    router_logits: (T, E) float; correction_bias: (E,) float, added to the scores for the choice
    alone; allowed: (E,) integers or bool, experts that may be chosen (all where None). Weights are
    (T, K) float32, ids (T, K) int32, best choice first, ties to the smaller id; a NaN is the last
    choice. Where fewer than K experts are allowed, the other slots are -1. The budget is applied as
    in `budgeted_slots_torch`. Shared experts are not appended.
    """
    scores = _scores(router_logits, router)
    choice = scores if correction_bias is None else scores + correction_bias.float()
    choice = torch.where(torch.isnan(choice), float("-inf"), choice)
    if router.num_groups > 1:
        choice = _in_best_groups(choice, router, pairs=correction_bias is not None)
    if allowed is not None:
        choice = choice.masked_fill(~allowed.bool(), float("-inf"))
    best = choice.argsort(dim=1, descending=True, stable=True)[:, : router.top_k]
    weights = scores.gather(1, best)
    ids = best.int()
    if allowed is not None:
        absent = ~allowed.bool()[best]
        ids, weights = ids.masked_fill(absent, DROPPED), weights.masked_fill(absent, 0.0)
    if router.renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + SMALLEST_MASS)
    weights = weights * router.scaling
    return budgeted_slots_torch(weights, ids, rows, layer_index, rule, step=step)


def _scores(router_logits: torch.Tensor, router: Router) -> torch.Tensor:
    logits = router_logits.float()
    return logits.softmax(dim=1) if router.scoring == "softmax" else logits.sigmoid()


def _in_best_groups(choice: torch.Tensor, router: Router, pairs: bool) -> torch.Tensor:
    """Return the choice scores (T, E), -inf outside each token's best groups."""
    num_tokens, num_experts = choice.shape
    grouped = choice.view(num_tokens, router.num_groups, -1)
    group_scores = grouped.topk(2 if pairs else 1, dim=2).values.sum(dim=2)
    order = group_scores.argsort(dim=1, descending=True, stable=True)
    outside = torch.ones_like(group_scores, dtype=torch.bool)
    outside.scatter_(1, order[:, : router.top_groups], False)
    return grouped.masked_fill(outside[:, :, None], float("-inf")).view(num_tokens, num_experts)
