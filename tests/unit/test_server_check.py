"""Which servers are refused. The facts stand in for GPU servers, which these tests cannot start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sglang_alloc.errors import NotMoEError, UnsupportedServerError
from sglang_alloc.server_check import REFUSED_OPTIONS, ServerFacts, check_server

GOOD = ServerFacts(
    model_path="org/model",
    device_type="cuda",
    runner_backend="triton",
    a2a_backend="none",
    options={name: fine for name, (fine, _) in REFUSED_OPTIONS.items()},
    router_widths={8},
    module_types={"TopK", "FusedMoE"},
    amx_experts=False,
)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_native_and_the_triton_experts_are_served(device: str, backend: str) -> None:
    check_server(replace(GOOD, device_type=device, runner_backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runner_backend": "flashinfer_trtllm"}, "flashinfer_trtllm has not been shown to skip"),
        ({"a2a_backend": "deepep"}, "deepep has not been shown to skip"),
        ({"device_type": "npu"}, "device 'npu' is not supported"),
        ({"amx_experts": True}, "AMX"),
        ({"router_widths": {6, 8}}, "different numbers of experts"),
        ({"module_types": {"HashTopK"}}, "chooses experts by itself"),
        ({"options": {"ep_size": 4}}, "--ep-size 4 is not supported"),
        ({"options": {"enable_dp_attention": True}}, "--enable-dp-attention True"),
    ],
)
def test_what_would_break_the_budget_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedServerError, match=message):
        check_server(replace(GOOD, **change))  # type: ignore[arg-type]


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(UnsupportedServerError, match=r"pp-size.*cutlass"):
        check_server(replace(GOOD, options={"pp_size": 2}, runner_backend="cutlass"))


def test_a_model_without_routers_is_dense() -> None:
    with pytest.raises(NotMoEError, match="no Mixture-of-Experts layer"):
        check_server(replace(GOOD, router_widths=set(), module_types={"Linear"}))
