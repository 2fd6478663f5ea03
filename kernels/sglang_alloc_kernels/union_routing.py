"""Mode `union` from the router's logits on: tokens choose anew among the experts of the set."""

from __future__ import annotations

import torch

from sglang_alloc_kernels.budgeted_routing import Router, budgeted_routing, budgeted_routing_torch
from sglang_alloc_kernels.budgeted_slots import Rule
from sglang_alloc_kernels.layer_rows import NO_STEP_TENSORS, LayerRows, StepTensors
from sglang_alloc_kernels.step_statistics import StepSums, make_step_sums


def union_routing_torch(
    router_logits: torch.Tensor,
    router: Router,
    rows: LayerRows,
    layer_index: int,
    rule: Rule = "quota",
    *,
    correction_bias: torch.Tensor | None = None,
    step: StepTensors = NO_STEP_TENSORS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route a decode step's tokens over the experts that their best choices opened.

    A variant for the bench: servers in mode `union` call `union_slots` behind their routing.

    Unlike `union_slots_torch`, a token is not held to its own K candidates: it takes its best K
    among all experts of the set, so every token has K slots where the set has K experts (OEA,
    arXiv 2511.02237, without its bound on the rank of riders). `rows.limits[layer_index]` says,
    by `rule`, which of each token's slots open the set, as in `union_slots_torch`; caps are not
    supported. With groups, a token's
    choice stays in its best groups. Shapes as in `budgeted_routing_torch`.
    """
    num_experts = router_logits.shape[1]
    opened: StepSums = make_step_sums(len(rows.limits), num_experts, router_logits.device)
    budgeted_routing_torch(
        *(router_logits, router, rows, layer_index, rule),
        correction_bias=correction_bias,
        step=step._replace(sums=opened),
    )
    everything = torch.full_like(rows.limits, router.top_k)
    return budgeted_routing_torch(
        *(router_logits, router, rows._replace(limits=everything), layer_index, "quota"),
        correction_bias=correction_bias,
        allowed=opened.lit[layer_index],
        step=step,
    )


def union_routing(
    router_logits: torch.Tensor,
    router: Router,
    rows: LayerRows,
    layer_index: int,
    rule: Rule = "quota",
    *,
    correction_bias: torch.Tensor | None = None,
    step: StepTensors = NO_STEP_TENSORS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `union_routing_torch`, in two launches after one that clears the set."""
    num_experts = router_logits.shape[1]
    opened = make_step_sums(len(rows.limits), num_experts, router_logits.device)
    budgeted_routing(
        *(router_logits, router, rows, layer_index, rule),
        correction_bias=correction_bias,
        step=step._replace(sums=opened),
    )
    return budgeted_routing(
        *(router_logits, router, rows, layer_index, "all"),
        correction_bias=correction_bias,
        allowed=opened.lit[layer_index],
        step=step,
    )
