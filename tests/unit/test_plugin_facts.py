"""What the engine's layers say of how their experts are computed, with small layers of our own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_alloc.plugin_facts import expert_kernel

EXPERTS, HIDDEN, INTERMEDIATE = 4, 16, 8
ONE_EACH = torch.ones(EXPERTS)
STATIC = torch.ones(EXPERTS)


def _layer(dtype: torch.dtype, **scales: torch.Tensor | None) -> SimpleNamespace:
    weights = torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE).to(dtype)
    method = SimpleNamespace(runner=SimpleNamespace(runner_backend=SimpleNamespace(value="triton")))
    return SimpleNamespace(quant_method=method, w2_weight=weights, **scales)


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ({"w2_weight_scale": ONE_EACH, "w2_input_scale": None}, True),
        ({"w2_weight_scale": ONE_EACH[:, None, None], "w2_input_scale": None}, True),
        ({"w2_weight_scale": ONE_EACH, "w2_input_scale": STATIC}, False),
        ({"w2_weight_scale": torch.ones(EXPERTS, HIDDEN, 1), "w2_input_scale": None}, False),
        ({"w2_weight_scale_inv": torch.ones(EXPERTS, 1, 1), "w2_input_scale": None}, False),
    ],
    ids=["dynamic", "dynamic, kept as a column", "static", "by channel", "by block"],
)
def test_an_fp8_layer_tells_whether_one_scale_found_while_serving_is_for_all_rows(
    scales: dict[str, torch.Tensor | None], expected: bool
) -> None:
    kernel = expert_kernel(_layer(torch.float8_e4m3fn, **scales))
    assert kernel.runner_backend == "triton"
    assert kernel.one_fp8_scale == expected


def test_other_weights_have_no_fp8_scale() -> None:
    assert not expert_kernel(_layer(torch.bfloat16)).one_fp8_scale
    assert not expert_kernel(_layer(torch.int8, w2_weight_scale=ONE_EACH)).one_fp8_scale
