"""Modes `layer` and `threshold` from the router's logits on: scores, top-K, budget, one launch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from sglang_alloc_kernels.budgeted_slots import Rule, budget_tile, budgeted_slots_torch
from sglang_alloc_kernels.drop_slots import DROPPED
from sglang_alloc_kernels.kept_slots_tile import (
    finish_slots_tile,
    score_slots_tile,
    store_slots_tile,
)
from sglang_alloc_kernels.kernel_launch import kernel_pointers, launches_early
from sglang_alloc_kernels.largest_keys_tile import sortable_bits_tile
from sglang_alloc_kernels.layer_rows import NO_STEP_TENSORS, LayerRows, StepTensors

# Keeps a row of zero weights from dividing by zero, as SGLang's routing does.
SMALLEST_MASS = tl.constexpr(1e-20)


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
    alone (for the bench: servers leave such layers to SGLang's routing); allowed: (E,) integers or
    bool, experts that may be chosen (all where None). Weights are (T, K) float32, ids (T, K) int32,
    best choice first, ties to the smaller id; a NaN is the last choice. Where fewer than K experts
    are allowed, the other slots are -1. The budget is applied as in `budgeted_slots_torch`. Shared
    experts are not appended.
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
        weights = weights / (weights.sum(dim=1, keepdim=True) + SMALLEST_MASS.value)
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


def budgeted_routing(
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
    """As `budgeted_routing_torch`, in one launch."""
    num_tokens, num_experts = router_logits.shape
    device = router_logits.device
    weights = torch.empty(num_tokens, router.top_k, dtype=torch.float32, device=device)
    ids = torch.empty(num_tokens, router.top_k, dtype=torch.int32, device=device)
    if num_tokens == 0:
        return weights, ids
    group_size = num_experts // router.num_groups
    early = launches_early(device)
    _budgeted_routing_kernel[(num_tokens,)](
        *(router_logits.contiguous(), correction_bias, allowed, weights, ids),
        *kernel_pointers(rows, step),
        *(layer_index, num_tokens, router.scaling),
        NUM_EXPERTS=num_experts,
        RULE=rule,
        SCORING=router.scoring,
        RENORMALIZE=router.renormalize,
        TOP_K=router.top_k,
        NUM_GROUPS=router.num_groups,
        TOP_GROUPS=router.top_groups,
        BLOCK_K=triton.next_power_of_2(router.top_k),
        BLOCK_GROUPS=triton.next_power_of_2(router.num_groups),
        BLOCK_SIZE=triton.next_power_of_2(group_size),
        EARLY=early,
        num_warps=1 if num_experts <= 256 else 2,
        launch_pdl=early,
    )
    return weights, ids


@triton.jit(do_not_specialize=["layer_index", "num_tokens", "scaling"])
def _budgeted_routing_kernel(
    logits_ptr,  # (T, E)
    bias_ptr,  # (E,) or None
    allowed_ptr,  # (E,) integers or None
    weights_ptr,  # (T, TOP_K) float32 out
    ids_ptr,  # (T, TOP_K) int32 out
    limits_ptr,  # (L,) float32
    gains_ptr,  # (L,) float32 or None
    references_ptr,  # (L,) float32 or None
    saliency_ptr,  # (L, E) float32 or None
    num_valid_ptr,  # (1,) int32 or None
    floors_ptr,  # (T,) int32 or None
    ceilings_ptr,  # (T,) int32 or None
    sums_ptr,  # (L, 4) float32 or None
    lit_ptr,  # (L, E) int8 or None
    layer_index,
    num_tokens,
    scaling,
    NUM_EXPERTS: tl.constexpr,
    RULE: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per token; its experts are a tile of groups by members.

    Launched EARLY, it waits for what comes before it.
    """
    if EARLY:
        gdc_wait()
    token = tl.program_id(0)
    logits_ptr += token.to(tl.int64) * NUM_EXPERTS
    group_size: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    groups, members = tl.arange(0, BLOCK_GROUPS)[:, None], tl.arange(0, BLOCK_SIZE)[None, :]
    experts = groups * group_size + members
    exists = (groups < NUM_GROUPS) & (members < group_size)
    logits = tl.load(logits_ptr + experts, mask=exists, other=float("-inf")).to(tl.float32)
    numbers = tl.where(logits == logits, logits, float("-inf"))
    # No lower than a finite number: the filler's -inf less -inf would be NaN.
    largest = tl.maximum(tl.max(tl.max(numbers, axis=1), axis=0), -3.4e38)
    total = tl.sum(tl.sum(tl.exp(logits - largest), axis=1), axis=0)
    choice = score_tile(logits, largest, total, SCORING)
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + experts, mask=exists, other=0.0).to(tl.float32)
    choice = tl.where(exists & (choice == choice), choice, float("-inf"))
    if NUM_GROUPS > 1:
        choice = best_groups_tile(choice, TOP_GROUPS, bias_ptr is not None)
    if allowed_ptr is not None:
        allowed = tl.load(allowed_ptr + experts, mask=exists, other=0) != 0
        choice = tl.where(allowed, choice, float("-inf"))
    ids = best_experts_tile(choice, experts, exists, TOP_K, BLOCK_K)

    tokens = token + tl.arange(0, 1)
    slots = tl.arange(0, BLOCK_K)[None, :]
    present = slots < TOP_K
    if num_valid_ptr is not None:
        present = present & (tokens < tl.load(num_valid_ptr))[:, None]
    if allowed_ptr is not None:
        present = present & (tl.load(allowed_ptr + ids, mask=present, other=0) != 0)
    chosen = tl.load(logits_ptr + ids, mask=present, other=float("-inf")).to(tl.float32)
    weights = tl.where(present, score_tile(chosen, largest, total, SCORING), 0.0)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + SMALLEST_MASS)
    weights = weights * scaling
    ids = tl.where(present, ids, -1)

    scores = score_slots_tile(weights, ids, saliency_ptr, layer_index, NUM_EXPERTS, TOP_K)
    kept = budget_tile(scores, tl.load(limits_ptr + layer_index), RULE)
    weights, ids = finish_slots_tile(
        *(weights, ids, scores, kept, tokens, num_tokens, layer_index),
        *(gains_ptr, references_ptr, floors_ptr, ceilings_ptr, sums_ptr, lit_ptr),
        *(NUM_EXPERTS, TOP_K),
    )
    store_slots_tile(weights_ptr, ids_ptr, weights, ids, tokens, num_tokens, TOP_K, BLOCK_K)


@triton.jit
def score_tile(logits, largest, total, SCORING: tl.constexpr):
    """Return the router's scores of logits; softmax needs the row's largest logit and its total."""
    return tl.exp(logits - largest) / total if SCORING == "softmax" else tl.sigmoid(logits)


@triton.jit
def best_groups_tile(choice, TOP_GROUPS: tl.constexpr, PAIRS: tl.constexpr):
    """Return the choice scores (G, M), -inf outside the best groups; ties to the first group."""
    best = tl.max(choice, axis=1)
    if PAIRS:
        members = tl.arange(0, choice.shape[1])[None, :]
        first = tl.argmax(choice, axis=1, tie_break_left=True)
        best += tl.max(tl.where(members == first[:, None], float("-inf"), choice), axis=1)
    groups = tl.arange(0, choice.shape[0])
    earlier = groups[None, :] < groups[:, None]
    ahead = (best[None, :] > best[:, None]) | ((best[None, :] == best[:, None]) & earlier)
    inside = tl.sum(ahead.to(tl.int32), axis=1) < TOP_GROUPS
    return tl.where(inside[:, None], choice, float("-inf"))


@triton.jit
def best_experts_tile(choice, experts, exists, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the ids (1, BLOCK_K) of the TOP_K best choices in order; ties to the smaller id."""
    # One number holds score and id, so that one reduction finds both; ids have 16 bits.
    packed = (sortable_bits_tile(choice) << 16) | (0xFFFF - experts).to(tl.int64)
    packed = tl.where(exists, packed, -1)
    slots = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros([1, BLOCK_K], tl.int32)
    for slot in range(TOP_K):
        best = tl.max(tl.max(packed, axis=1), axis=0)
        ids = tl.where(slots == slot, (0xFFFF - (best & 0xFFFF)).to(tl.int32), ids)
        packed = tl.where(packed == best, -1, packed)
    return ids
