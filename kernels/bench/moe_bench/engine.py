"""Bench, SGLang's own part: its routing and its Triton experts, called as its layers call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from moe_bench.budgets import Slots
from moe_bench.shapes import ExpertWeights, LayerInputs, MoEShape
from sglang_alloc.compatibility import installed_version
from sglang_alloc.compatibility_seams import TRITON_EXPERTS
from sglang_alloc.cpu_moe import GatedExperts, forward_gated_experts
from sglang_alloc.server_runs.reference_files import MODEL
from sglang_alloc.triton_experts import skip_dropped

SEQUENCE = TRITON_EXPERTS.rpartition(".")[2]

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]


def prepare_engine(device: torch.device) -> None:
    """Give SGLang's kernels the settings that they look up; any MoE model's will do."""
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    arguments = ServerArgs(
        model_path=str(MODEL),
        device=device.type,
        attention_backend="triton" if device.type == "cuda" else "torch_native",
        sampling_backend="pytorch",
    )
    set_global_server_args_for_scheduler(arguments)


def stock_routing(shape: MoEShape, inputs: LayerInputs) -> Callable[[], Slots]:
    """Return SGLang's whole routing of a layer, `select_experts`, as a call without arguments."""
    from sglang.srt.layers.moe.topk import TopKConfig, select_experts

    router = shape.router
    grouped: dict[str, Any] = {}
    if shape.grouped:
        grouped = {
            "use_grouped_topk": True,
            "num_expert_group": router.num_groups,
            "topk_group": router.top_groups,
            "routed_scaling_factor": router.scaling,
        }
    config = TopKConfig(
        top_k=router.top_k,
        renormalize=router.renormalize,
        scoring_func=router.scoring,
        correction_bias=inputs.correction_bias,
        torch_native=inputs.hidden_states.device.type == "cpu",
        **grouped,
    )

    def route() -> Slots:
        chosen = select_experts(inputs.hidden_states, inputs.router_logits, config, layer_id=0)
        return chosen.topk_weights, chosen.topk_ids

    return route


def triton_experts(experts: ExpertWeights) -> Experts:
    """Return SGLang's fused Triton MoE: (hidden_states, weights, ids, filter_expert) -> output.

    The output overwrites hidden_states, as in SGLang's layers. Where dropped slots are filtered,
    the kernels get the arguments that the plugin's hook gives them; stock is called as it is.
    """
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    sequence = getattr(fused_moe, SEQUENCE)
    if not isinstance(sequence, AsHooked):
        setattr(fused_moe, SEQUENCE, AsHooked(sequence))

    def run(
        hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, filter_expert: bool
    ) -> torch.Tensor:
        output: torch.Tensor = fused_moe.fused_experts_impl(
            *(hidden_states, experts.w13, experts.w2, weights, ids),
            inplace=True,
            filter_expert=filter_expert,
        )
        return output

    return run


class AsHooked(NamedTuple):
    """SGLang's `TRITON_EXPERTS`, called as under the plugin where dropped slots are filtered."""

    sequence: Callable[..., torch.Tensor]

    def __call__(self, *args: Any, filter_expert: bool, **kwargs: Any) -> torch.Tensor:
        kwargs["filter_expert"] = False  # as SGLang calls it where all experts are local
        if filter_expert:
            args, kwargs = skip_dropped(args, kwargs, installed_version())
        return self.sequence(*args, **kwargs)


def gated_experts(experts: ExpertWeights) -> Experts:
    """Return what computes kept slots on a CPU; there is no way to filter that it could leave."""
    gated = GatedExperts(experts.w13, experts.w2, functional.silu)

    def run(
        hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, filter_expert: bool
    ) -> torch.Tensor:
        return forward_gated_experts(gated, hidden_states, weights, ids)

    return run
