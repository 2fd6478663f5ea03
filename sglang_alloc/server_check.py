"""Data story: which server options the budget can be enforced under, and the reason for each no."""

from __future__ import annotations

from typing import Any

from sglang_alloc.errors import NotMoEError, UnsupportedServerError

# Backends whose kernels leave out a slot of id -1. The others are refused until that is shown.
SKIPPING_BACKENDS = {"cpu": {"auto", "triton"}, "cuda": {"auto", "triton"}}


def check_server(server_args: Any, device_type: str, moe_routers: list[Any]) -> None:
    """Raise UnsupportedServerError naming each option under which the budget would not hold.

    moe_routers: the model's TopK modules; none at all is NotMoEError.
    """
    if not moe_routers:
        raise NotMoEError(
            f"{server_args.model_path!r} has no Mixture-of-Experts layer, so there is no budget to "
            "set: serve it without SGLANG_ALLOC_TABLE"
        )
    problems = [*_parallelism(server_args), *_execution(server_args, device_type)]
    problems += _routers(moe_routers)
    if problems:
        raise UnsupportedServerError("; ".join(problems))


def _parallelism(server_args: Any) -> list[str]:
    refused = {
        "pp_size": "pipeline stages would have to receive the budget with their requests",
        "ep_size": "no expert-parallel dispatcher has been shown to skip single dropped slots",
        "dp_size": "data-parallel ranks of one server do not share a request broadcast; "
        "run one server per replica instead",
    }
    return [
        f"--{name.replace('_', '-')} {value} is not supported: {reason}"
        for name, reason in refused.items()
        if (value := getattr(server_args, name, 1) or 1) != 1
    ]


def _execution(server_args: Any, device_type: str) -> list[str]:
    problems = []
    if device_type not in SKIPPING_BACKENDS:
        return [f"device {device_type!r} is not supported: use cpu or cuda"]
    backend = str(getattr(server_args, "moe_runner_backend", "auto"))
    if backend not in SKIPPING_BACKENDS[device_type]:
        problems.append(
            f"--moe-runner-backend {backend} has not been shown to skip a dropped slot: "
            "use --moe-runner-backend triton"
        )
    dispatcher = str(getattr(server_args, "moe_a2a_backend", "none") or "none")
    if dispatcher != "none":
        problems.append(
            f"--moe-a2a-backend {dispatcher} has not been shown to skip a dropped slot: use none"
        )
    if device_type == "cpu" and getattr(server_args, "enable_torch_compile", False):
        problems.append(
            "--enable-torch-compile replaces the CPU experts with a function that cannot take a "
            "dropped slot: start without it"
        )
    return problems


def _routers(moe_routers: list[Any]) -> list[str]:
    widths = {router.topk_config.top_k for router in moe_routers}
    if len(widths) > 1:
        return [f"the layers route to different numbers of experts ({sorted(widths)})"]
    return []
