"""Which servers are refused. The facts stand in for GPU servers, which these tests cannot start."""

from __future__ import annotations

from dataclasses import replace

import pytest
from server_facts import GOOD, TRITON

from sglang_alloc.errors import NotMoEError, UnsupportedServerError
from sglang_alloc.server_check import (
    ExpertKernel,
    check_server,
)

NATIVE = ExpertKernel("UnquantizedFusedMoEMethod", "auto", amx=False)


def test_the_triton_experts_are_served_on_a_gpu() -> None:
    for engine_version in ("0.5.16", "0.5.23"):
        by_block = ExpertKernel("Fp8MoEMethod", "triton", amx=False)
        facts = replace(GOOD, engine_version=engine_version, expert_kernels={TRITON, by_block})
        check_server(facts)


def test_one_fp8_scale_for_all_rows_needs_a_release_whose_dropped_rows_are_zeros() -> None:
    """Before 0.5.23 the scale is taken over rows that nobody wrote, and every token comes wrong."""
    by_tensor = ExpertKernel("Fp8MoEMethod", "triton", amx=False, one_fp8_scale=True)
    facts = replace(GOOD, expert_kernels={TRITON, by_tensor})
    check_server(facts)
    with pytest.raises(UnsupportedServerError, match=r"Fp8MoEMethod .*one scale for all rows"):
        check_server(replace(facts, engine_version="0.5.22"))


def test_the_native_experts_are_served_on_a_cpu() -> None:
    check_server(replace(GOOD, device_type="cpu", expert_kernels={NATIVE}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"expert_kernels": {TRITON, ExpertKernel("AWQMoEMethod", "marlin", False)}},
            "AWQMoEMethod",
        ),
        ({"expert_kernels": {NATIVE}}, "runner auto"),
        ({"expert_kernels": set()}, "no layer tells which kernel"),
        ({"a2a_backend": "deepep"}, "deepep is not supported: it has not been shown to skip"),
        ({"device_type": "npu"}, "device 'npu' is not supported"),
        ({"is_rocm": True}, "device ROCm is not supported"),
        ({"router_widths": {6, 8}}, "different numbers of experts"),
        ({"module_types": {"HashTopK"}}, "chooses experts by itself"),
        ({"options": {"ep_size": 4}}, "--ep-size 4 is not supported"),
        ({"options": {"enable_dp_attention": True}}, "--enable-dp-attention True"),
        (
            {"options": {"enable_fused_moe_sum_all_reduce": True}},
            "zeros overwrite the sums",
        ),
        ({"options": {"init_expert_location": "plan.json"}}, "renumbers experts"),
        ({"options": {"ep_dispatch_algorithm": "dynamic"}}, "the last one's for a dropped slot"),
        ({"options": {"dllm_algorithm": "LowConfidence"}}, "rules of either phase"),
        ({"graph_backends": {"prefill": "tc_piecewise"}}, "--cuda-graph-backend-prefill"),
    ],
)
def test_what_would_break_the_budget_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedServerError, match=message):
        check_server(replace(GOOD, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kernel",
    [
        ExpertKernel("UnquantizedFusedMoEMethod", "auto", amx=True),
        ExpertKernel("AWQMoEMethod", "auto", amx=False),
        ExpertKernel("W8A8Int8MoEMethod", "auto", amx=False),
    ],
)
def test_cpu_experts_that_never_reach_the_native_function_are_refused(kernel: ExpertKernel) -> None:
    with pytest.raises(UnsupportedServerError, match="serve unquantised weights"):
        check_server(replace(GOOD, device_type="cpu", expert_kernels={kernel}))


def test_every_problem_is_named_at_once() -> None:
    kernel = ExpertKernel("Fp8MoEMethod", "cutlass", amx=False)
    with pytest.raises(UnsupportedServerError, match=r"pp-size.*cutlass"):
        check_server(replace(GOOD, options={"pp_size": 2}, expert_kernels={kernel}))


def test_a_model_without_routers_is_dense() -> None:
    with pytest.raises(NotMoEError, match="no Mixture-of-Experts layer"):
        check_server(replace(GOOD, router_widths=set(), module_types={"Linear"}))
