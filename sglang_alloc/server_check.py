"""Data story: which server options the budget can be enforced under, and the reason for each no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sglang_alloc.compatibility import is_before
from sglang_alloc.compatibility_seams import SKIPS_UNASKED
from sglang_alloc.errors import NotMoEError, UnsupportedServerError
from sglang_alloc.moe_backends import DISPATCHERS, GRAPHS, RUNNERS, Verdict
from sglang_alloc.triton_experts import ONE_FP8_SCALE

DEVICES = ("cpu", "cuda")

_SHARDED = "has not been shown to leave every rank with the same routing and quotas"
_PHYSICAL_IDS = "renumbers experts, and the table's saliency belongs to the model's own numbers"

# Options under which the budget would not hold: the value that is fine, and why others are not.
REFUSED_OPTIONS: dict[str, tuple[object, str]] = {
    "pp_size": (1, "pipeline stages would have to receive the budget with their requests"),
    "ep_size": (1, "no expert-parallel dispatcher has been shown to skip single dropped slots"),
    "dp_size": (
        1,
        "data-parallel ranks of one server do not share a request broadcast; run one server per "
        "replica instead",
    ),
    "attn_cp_size": (1, _SHARDED),
    "moe_dp_size": (1, _SHARDED),
    "enable_dp_attention": (False, "its padding rows have not been shown to stay out of routing"),
    "enable_eplb": (False, _PHYSICAL_IDS),
    "ep_dispatch_algorithm": (
        None,
        "it looks up a copy of each slot's expert, and finds the last one's for a dropped slot",
    ),
    "ep_num_redundant_experts": (0, _PHYSICAL_IDS),
    "init_expert_location": ("trivial", _PHYSICAL_IDS),
    "enable_lora": (False, "adapters on experts have not been shown to take a dropped slot"),
    "enable_pdmux": (False, "prefill and decode would run at once and share the rows in force"),
    "enable_nvidia_megakernel": (False, "the kernel routes inside itself"),
    "enable_fused_moe_sum_all_reduce": (
        False,
        "before SGLang 0.5.23 a dropped slot's zeros overwrite the sums of others; untested since",
    ),
    "enable_two_batch_overlap": (False, "prefill and decode halves would share one budget"),
    "enable_torch_compile": (
        False,
        "the compiled CPU experts cannot take a dropped slot, and compiled routing is untested",
    ),
    "dllm_algorithm": (
        None,
        "a diffusion model's steps run in decode's graphs or in prefill's, as they fit, and so "
        "under the rules of either phase",
    ),
    "kt_weight_path": (None, "experts computed by KTransformers have not been shown to skip slots"),
}

# Routers of single architectures that choose experts without the common routing function.
OWN_ROUTERS = ("HashTopK", "TransformersFusedMoE")


class ExpertKernel(NamedTuple):
    """What computes a layer's experts: SGLang's names of quantisation method and runner.

    one_fp8_scale: its FP8 activations are quantised by one scale that is found while serving.
    """

    quant_method: str
    runner_backend: str
    amx: bool
    one_fp8_scale: bool = False


@dataclass(frozen=True)
class ServerFacts:
    """What is in force on this rank, after SGLang has resolved its arguments.

    `options` holds the values of REFUSED_OPTIONS; `graph_backends` how the graphs of each phase are
    captured, as far as SGLang says; `router_widths` the distinct top-k widths of the
    routers found; `expert_kernels` what computes the experts, over all MoE layers;
    `engine_version` is SGLang's.
    """

    model_path: str
    engine_version: str
    device_type: str
    is_rocm: bool
    a2a_backend: str
    options: Mapping[str, object]
    router_widths: set[int]
    module_types: set[str]
    expert_kernels: set[ExpertKernel]
    graph_backends: Mapping[str, str] = field(default_factory=dict)


def check_server(facts: ServerFacts) -> None:
    """Raise UnsupportedServerError naming everything under which the budget would not hold.

    A model without any MoE router raises NotMoEError.
    """
    own_routers = facts.module_types.intersection(OWN_ROUTERS)
    if not facts.router_widths and not own_routers:
        raise NotMoEError(
            f"{facts.model_path!r} has no Mixture-of-Experts layer, so there is no budget to set: "
            "serve it without SGLANG_ALLOC_TABLE"
        )
    problems = [*_options(facts), *_kernels(facts), *_routers(facts)]
    if problems:
        raise UnsupportedServerError("; ".join(problems))


def _options(facts: ServerFacts) -> list[str]:
    problems = [
        f"--{name.replace('_', '-')} {found} is not supported: {reason}"
        for name, (fine, reason) in REFUSED_OPTIONS.items()
        if (found := facts.options.get(name)) not in (None, fine)
    ]
    dispatcher = DISPATCHERS.get(facts.a2a_backend, _UNKNOWN)
    if not dispatcher.works:
        problems.append(
            f"--moe-a2a-backend {facts.a2a_backend} is not supported: it {dispatcher.reason}: use "
            "--moe-a2a-backend none"
        )
    return problems + _graphs(facts)


def _graphs(facts: ServerFacts) -> list[str]:
    """Ways of capturing graphs; one of them, up to SGLang 0.5.21, goes through torch.compile."""
    if facts.device_type == "cpu":
        return []
    return [
        f"--cuda-graph-backend-{phase} {backend} is not supported: {verdict.reason}"
        for phase, backend in facts.graph_backends.items()
        if not (verdict := GRAPHS.get(backend, _UNKNOWN)).works
    ]


def _kernels(facts: ServerFacts) -> list[str]:
    if facts.device_type not in DEVICES or facts.is_rocm:
        device = "ROCm" if facts.is_rocm else repr(facts.device_type)
        return [f"device {device} is not supported: use a CPU or an NVIDIA GPU"]
    if not facts.expert_kernels:
        return ["no layer tells which kernel computes its experts, so none can be trusted"]
    return [
        f"experts computed by {kernel.quant_method} (runner {kernel.runner_backend}"
        f"{', AMX' if kernel.amx else ''}) have not been shown to skip a dropped slot: "
        f"{verdict.reason}"
        for kernel in sorted(facts.expert_kernels)
        if not (verdict := _judged(kernel, facts)).works
    ]


_UNKNOWN = Verdict(False, "is not known to this release of sglang-alloc")


def _judged(kernel: ExpertKernel, facts: ServerFacts) -> Verdict:
    return _on_cpu(kernel) if facts.device_type == "cpu" else _on_cuda(kernel, facts.engine_version)


def _on_cpu(kernel: ExpertKernel) -> Verdict:
    is_native = kernel.quant_method == "UnquantizedFusedMoEMethod" and not kernel.amx
    return Verdict(is_native, "serve unquantised weights")


def _on_cuda(kernel: ExpertKernel, engine_version: str) -> Verdict:
    verdict = RUNNERS.get(kernel.runner_backend, _UNKNOWN)
    if verdict.works and kernel.one_fp8_scale and is_before(engine_version, SKIPS_UNASKED):
        return Verdict(False, ONE_FP8_SCALE)
    return verdict._replace(
        reason=f"{verdict.reason}; start SGLang with --moe-runner-backend triton"
    )


def _routers(facts: ServerFacts) -> list[str]:
    own = sorted(facts.module_types.intersection(OWN_ROUTERS))
    if own:
        return [f"this architecture chooses experts by itself ({', '.join(own)})"]
    if len(facts.router_widths) > 1:
        widths = sorted(facts.router_widths)
        return [f"the layers route to different numbers of experts ({widths})"]
    return []
