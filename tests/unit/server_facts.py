"""Facts of a GPU server that is served: stand-ins for servers which these tests cannot start."""

from __future__ import annotations

from sglang_alloc.server_check import REFUSED_OPTIONS, ExpertKernel, ServerFacts

TRITON = ExpertKernel("UnquantizedFusedMoEMethod", "triton", amx=False)
GOOD = ServerFacts(
    model_path="org/model",
    engine_version="0.5.23",
    device_type="cuda",
    is_rocm=False,
    a2a_backend="none",
    options={name: fine for name, (fine, _) in REFUSED_OPTIONS.items()},
    router_widths={8},
    module_types={"TopK", "FusedMoE"},
    expert_kernels={TRITON},
)
