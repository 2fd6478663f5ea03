"""Data story: which server options the budget can be enforced under, and the reason for each no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sglang_alloc.errors import NotMoEError, UnsupportedServerError

# MoE runner backends whose kernels leave out a slot of id -1; others are refused until shown to.
SKIPPING_BACKENDS = ("auto", "triton")
DEVICES = ("cpu", "cuda")

# Options under which the budget would not hold: the value that is fine, and why others are not.
REFUSED_OPTIONS: dict[str, tuple[object, str]] = {
    "pp_size": (1, "pipeline stages would have to receive the budget with their requests"),
    "ep_size": (1, "no expert-parallel dispatcher has been shown to skip single dropped slots"),
    "dp_size": (
        1,
        "data-parallel ranks of one server do not share a request broadcast; run one server per "
        "replica instead",
    ),
    "enable_dp_attention": (False, "its padding rows have not been shown to stay out of routing"),
    "enable_nvidia_megakernel": (False, "the kernel routes inside itself"),
    "enable_two_batch_overlap": (False, "prefill and decode halves would share one budget"),
    "enable_torch_compile": (
        False,
        "the compiled CPU experts cannot take a dropped slot, and compiled routing is untested",
    ),
}

# Routers of single architectures that choose experts without the common routing function.
OWN_ROUTERS = ("HashTopK", "TransformersFusedMoE")


@dataclass(frozen=True)
class ServerFacts:
    """What is in force on this rank, after SGLang has resolved its arguments.

    `options` holds the values of REFUSED_OPTIONS; `router_widths` the distinct top-k widths of the
    routers found; `amx_experts` whether Intel's AMX expert kernels run.
    """

    model_path: str
    device_type: str
    runner_backend: str
    a2a_backend: str
    options: Mapping[str, object]
    router_widths: set[int]
    module_types: set[str]
    amx_experts: bool


def check_server(facts: ServerFacts) -> None:
    """Raise UnsupportedServerError naming everything under which the budget would not hold.

    A model without any MoE router raises NotMoEError.
    """
    if not facts.router_widths and not facts.module_types.intersection(OWN_ROUTERS):
        raise NotMoEError(
            f"{facts.model_path!r} has no Mixture-of-Experts layer, so there is no budget to set: "
            "serve it without SGLANG_ALLOC_TABLE"
        )
    problems = [*_options(facts), *_backends(facts), *_routers(facts)]
    if problems:
        raise UnsupportedServerError("; ".join(problems))


def _options(facts: ServerFacts) -> list[str]:
    return [
        f"--{name.replace('_', '-')} {found} is not supported: {reason}"
        for name, (fine, reason) in REFUSED_OPTIONS.items()
        if (found := facts.options.get(name)) not in (None, fine)
    ]


def _backends(facts: ServerFacts) -> list[str]:
    problems = []
    if facts.device_type not in DEVICES:
        problems.append(f"device {facts.device_type!r} is not supported: use cpu or cuda")
    if facts.runner_backend not in SKIPPING_BACKENDS:
        problems.append(
            f"--moe-runner-backend {facts.runner_backend} has not been shown to skip a dropped "
            "slot: use --moe-runner-backend triton"
        )
    if facts.a2a_backend != "none":
        problems.append(
            f"--moe-a2a-backend {facts.a2a_backend} has not been shown to skip a dropped slot: "
            "use --moe-a2a-backend none"
        )
    if facts.amx_experts:
        problems.append(
            "the AMX expert kernels have not been shown to take a dropped slot: use the native CPU "
            "path or a GPU"
        )
    return problems


def _routers(facts: ServerFacts) -> list[str]:
    own = sorted(facts.module_types.intersection(OWN_ROUTERS))
    if own:
        return [f"this architecture chooses experts by itself ({', '.join(own)})"]
    if len(facts.router_widths) > 1:
        widths = sorted(facts.router_widths)
        return [f"the layers route to different numbers of experts ({widths})"]
    return []
