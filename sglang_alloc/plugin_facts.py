"""Data story, before serving: what the engine's own objects say about the model and the server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from sglang_alloc.compatibility import installed_version
from sglang_alloc.errors import UnsupportedServerError
from sglang_alloc.model_identity import ModelIdentity
from sglang_alloc.server_check import REFUSED_OPTIONS, ExpertKernel, ServerFacts
from sglang_alloc.worker import ServedModel

_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
_LAYER_IN_NAME = re.compile(r"\blayers\.(\d+)\.")


def moe_routers(model: torch.nn.Module) -> dict[int, Any]:
    """Return the model's routers by layer id, in order.

    The id comes from the module's name ("model.layers.3.mlp.topk"): before SGLang 0.5.22 some
    architectures leave `TopK.layer_id` empty. Raises UnsupportedServerError for a router whose
    layer cannot be told, or a layer with two.
    """
    from sglang.srt.layers.moe.topk import TopK

    routers: dict[int, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, TopK):
            continue
        match = _LAYER_IN_NAME.search(name)
        layer_id = int(match.group(1)) if match else module.layer_id
        if layer_id is None or layer_id in routers:
            raise UnsupportedServerError(
                f"the router {name!r} is not the only one of a numbered layer, so the table has "
                "no row for it: this architecture is not supported"
            )
        routers[layer_id] = module
    return dict(sorted(routers.items()))


def server_facts(model_runner: Any, routers: dict[int, Any]) -> ServerFacts:
    """Read what is in force."""
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    arguments = model_runner.server_args
    resolved = resolved_options(arguments)
    modules = list(model_runner.model.modules())
    return ServerFacts(
        model_path=str(arguments.model_path),
        engine_version=installed_version(),
        device_type=str(model_runner.device),
        is_rocm=torch.version.hip is not None,
        a2a_backend=str(get_moe_a2a_backend().value),
        options={name: resolved.get(name) for name in REFUSED_OPTIONS},
        graph_backends=graph_backends(resolved.get("cuda_graph_config")),
        router_widths={router.topk_config.top_k for router in routers.values()},
        module_types={type(module).__name__ for module in modules},
        expert_kernels={expert_kernel(layer) for layer in expert_layers(model_runner.model)},
    )


def resolved_options(server_args: Any) -> Mapping[str, Any]:
    """Return the options in force, which from 0.5.20 on are not what the command line says."""
    options: Mapping[str, Any] = (
        server_args.resolved_dict() if hasattr(server_args, "resolved_dict") else vars(server_args)
    )
    return options


def graph_backends(config: Any) -> dict[str, str]:
    """Return how the graphs of each phase are captured.

    config: SGLang's `cuda_graph_config`, a record of records, or plain data once it is resolved.
    """

    def plain(record: Any) -> Any:
        return record if isinstance(record, dict) else vars(record)

    if config is None:
        return {}
    return {phase: str(plain(settings)["backend"]) for phase, settings in plain(config).items()}


def largest_forward(server_args: Any) -> int:
    """Return how many tokens one forward may have, as far as the arguments say."""
    chunk = int(getattr(server_args, "chunked_prefill_size", None) or -1)
    return chunk if chunk > 0 else int(getattr(server_args, "max_prefill_tokens", 16384))


def expert_layers(model: torch.nn.Module) -> list[Any]:
    names = ("moe_runner_config", "quant_method")
    return [module for module in model.modules() if all(hasattr(module, n) for n in names)]


def expert_kernel(experts: Any) -> ExpertKernel:
    """Tell which kernel computes one layer's experts; quantisation may choose it per layer."""
    method = experts.quant_method
    backend = getattr(getattr(method, "runner", None), "runner_backend", None)
    return ExpertKernel(
        quant_method=type(method).__name__,
        runner_backend=str(getattr(backend, "value", backend)),
        amx=bool(getattr(experts, "use_intel_amx_backend", False)),
        one_fp8_scale=_has_one_fp8_scale(experts),
    )


def _has_one_fp8_scale(experts: Any) -> bool:
    """Return whether one scale, found while serving, quantises what enters the second product.

    Blocks and channels of weights have more scales than one an expert, and go with scales of their
    own for each token; static scales are given.
    """
    weights = getattr(experts, "w2_weight", None)
    if not isinstance(weights, torch.Tensor) or weights.dtype not in _FP8:
        return False
    scales = getattr(experts, "w2_weight_scale", None)
    has_one_each = isinstance(scales, torch.Tensor) and scales.numel() == len(weights)
    return has_one_each and getattr(experts, "w2_input_scale", None) is None


def served_model(
    model_runner: Any, routers: dict[int, Any], identity: ModelIdentity
) -> ServedModel:
    from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank

    topk_config = next(iter(routers.values())).topk_config
    arguments = model_runner.server_args
    return ServedModel(
        name=str(arguments.served_model_name or arguments.model_path),
        fingerprint=identity.fingerprint(),
        layer_ids=tuple(routers),
        top_k=topk_config.top_k - num_shared_columns(topk_config),
        num_experts=identity.num_experts,
        rank=get_tensor_model_parallel_rank(),
        device_type=str(model_runner.device),
    )


def num_shared_columns(topk_config: Any) -> int:
    """Return the number of trailing shared-expert columns, under either of SGLang's names."""
    if hasattr(topk_config, "num_shared_topk_slots"):
        return int(topk_config.num_shared_topk_slots)
    return int(getattr(topk_config, "num_fused_shared_experts", 0) or 0)
