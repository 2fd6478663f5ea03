"""Data story, before serving: proof on made-up tokens that the real layers obey the budget."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from sglang_alloc.compatibility_seams import CPU_EXPERTS, ROUTED_SLOTS
from sglang_alloc.cpu_moe import forward_gated_experts, gated_experts
from sglang_alloc.enforcement import RoutedSlots
from sglang_alloc.errors import UnsupportedServerError
from sglang_alloc.plugin_facts import num_shared_columns
from sglang_alloc.worker_tables import enforcement_tables

if TYPE_CHECKING:
    from sglang_alloc.worker import Worker


_RAISED = 1e30  # far above any score, and finite in float32


def is_hooked(target: str, hook: Callable[..., Any]) -> bool:
    """Return whether the object at `target` now calls `hook`, by walking its chain of wrappers."""
    function = pkgutil.resolve_name(target)
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def unrecorded() -> AbstractContextManager[None]:
    """Return a block in which SGLang's recorder of the distribution of experts counts nothing."""
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder

    region: AbstractContextManager[None]
    region = get_global_expert_distribution_recorder().disable_this_region()
    return region


def prove_routing(worker: Worker, layer_index: int, router: Any) -> RoutedSlots:
    """Route three made-up tokens through a real layer at the smallest budget; return their slots.

    Proves that the layer's own call reaches the hook, and that slots are dropped where the quota
    asks for it: a stale binding or a backend that routes elsewhere shows here, before the server
    is ready. Thresholds are raised so far meanwhile that all but the first slot are below them.
    """
    shape, model = worker.table.shape, worker.model
    tables = enforcement_tables(worker.table, worker.mode)
    raises_thresholds = tables.rule_of("decode") == "threshold"
    plain, raised = [1.0] * shape.num_layers, [_RAISED] * shape.num_layers
    hidden_states = torch.zeros(3, 8, device=model.device_type)
    logits = -4.0 * torch.arange(model.num_experts, device=model.device_type).float()
    worker.enforcement.set_budgets(shape.budget_min, shape.budget_min)
    if raises_thresholds:
        worker.enforcement.set_threshold_factors(plain, raised)
    worker.enforcement.begin_forward("decode")
    try:
        output = router(hidden_states, logits.repeat(3, 1))
    finally:
        worker.enforcement.set_budgets(shape.budget_max, shape.budget_max)
        if raises_thresholds:
            worker.enforcement.set_threshold_factors(plain, plain)
        worker.enforcement.begin_forward("decode")
    if type(output).__name__ != "StandardTopKOutput":
        raise UnsupportedServerError(
            f"the MoE backend routes inside its kernel ({type(output).__name__}), so no slot can "
            "be dropped: start SGLang with --moe-runner-backend triton"
        )
    if raises_thresholds:
        thresholds = tables.decode.thresholds  # a table of probes has none
        must_drop = thresholds is not None and bool(thresholds[0, layer_index] > 0)
    else:
        must_drop = bool(tables.decode.quotas[0, layer_index] < model.top_k)
    dropped = bool((output.topk_ids < 0).any())
    if not worker.has_seen(layer_index) or (must_drop and not dropped):
        raise UnsupportedServerError(
            f"the routing of MoE layer {model.layer_ids[layer_index]} does not obey the budget: "
            f"the hook on {ROUTED_SLOTS} is registered but not reached"
        )
    num_shared = num_shared_columns(router.topk_config)
    return RoutedSlots(output.topk_weights, output.topk_ids, num_shared)


def computes_as_the_engine(layer: Any, top_k: int) -> bool:
    """Compare our computation of a layer's experts with the engine's, on four made-up tokens.

    Where they differ, or the layer is of a kind that is not ours to compute, the engine's own
    function goes on computing the experts, with more copying around it.
    """
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    experts = gated_experts(layer, layer.moe_runner_config)
    if experts is None:
        return False
    made_up = torch.Generator().manual_seed(0)
    num_experts, hidden_size = len(experts.w13), experts.w13.shape[2]
    hidden_states = torch.randn(4, hidden_size, generator=made_up).to(experts.w13.dtype)
    weights, ids = torch.rand(4, num_experts, generator=made_up).topk(top_k)
    engine = pkgutil.resolve_name(CPU_EXPERTS)
    slots = StandardTopKOutput(weights, ids.int(), None)
    with torch.inference_mode():
        expected = engine(layer, hidden_states, slots, layer.moe_runner_config).float()
        found = forward_gated_experts(experts, hidden_states, weights, ids.int()).float()
    allowed = max(16 * torch.finfo(experts.w13.dtype).eps, 1e-4) * expected.abs().max()
    return bool((found - expected).abs().max() <= allowed)
