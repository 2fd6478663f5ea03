"""The CPU experts over kept slots only, against the plain definition and SGLang's own function."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from sglang_alloc.cpu_moe import forward_gated_experts, forward_kept_slots, gated_experts

TOKENS, TOP_K, EXPERTS, HIDDEN, INTERMEDIATE = 9, 3, 5, 8, 6

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _make_layer(dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    return SimpleNamespace(
        num_experts=EXPERTS,
        w13_weight=torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator).to(dtype),
        w2_weight=torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator).to(dtype),
        **extra,
    )


def _make_config(activation: str = "silu", **changes: Any) -> Any:
    plain = {"apply_router_weight_on_input": False, "gemm1_alpha": None, "gemm1_clamp_limit": None}
    return SimpleNamespace(activation=activation, **(plain | changes))


def _make_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_states = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights, ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K)
    return hidden_states, weights, ids.int()


def _drop_some(weights: torch.Tensor, ids: torch.Tensor) -> None:
    for slot in ((0, 1), (3, 0), (3, 2), (5, 0), (5, 1), (5, 2)):
        weights[slot], ids[slot] = 0.0, -1


def _expert(layer: Any, expert: int, row: torch.Tensor) -> torch.Tensor:
    gate, up = (layer.w13_weight[expert] @ row).chunk(2)
    return layer.w2_weight[expert] @ (functional.silu(gate) * up)


def _expert_forward(rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Stands in for the engine's function, which takes no id of -1."""
    assert int(ids.min()) >= 0
    layer = _make_layer()
    outputs = [_expert(layer, int(e), row) for e, row in zip(ids[:, 0], rows, strict=True)]
    return torch.stack(outputs) * weights


def _kept(hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return forward_kept_slots(_expert_forward, hidden_states, weights, ids)


def _gated(hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    experts = gated_experts(_make_layer(hidden_states.dtype), _make_config())
    assert experts is not None
    return forward_gated_experts(experts, hidden_states, weights, ids)


@pytest.mark.parametrize("forward", [_kept, _gated])
def test_dropped_slots_add_nothing_and_kept_ones_their_weighted_output(forward: Forward) -> None:
    hidden_states, weights, ids = _make_batch()
    _drop_some(weights, ids)
    mixture = forward(hidden_states, weights, ids)
    for token in range(TOKENS):
        expected = torch.zeros(HIDDEN)
        for slot in (ids[token] >= 0).nonzero()[:, 0].tolist():
            output = _expert(_make_layer(), int(ids[token, slot]), hidden_states[token])
            expected += weights[token, slot] * output
        torch.testing.assert_close(mixture[token], expected)


@pytest.mark.parametrize("forward", [_kept, _gated])
def test_a_batch_of_padding_rows_gives_zeros_in_the_dtype_of_the_input(forward: Forward) -> None:
    hidden_states, weights, ids = _make_batch()
    none, zeros = torch.full_like(ids, -1), torch.zeros_like(weights)
    mixture = forward(hidden_states.bfloat16(), zeros, none)
    assert mixture.dtype == torch.bfloat16
    assert not mixture.any()


@pytest.mark.parametrize("forward", [_kept, _gated])
def test_a_token_that_is_not_a_number_spoils_no_other(forward: Forward) -> None:
    hidden_states, weights, ids = _make_batch()
    _drop_some(weights, ids)
    expected = forward(hidden_states, weights, ids)
    spoilt = hidden_states.clone()
    spoilt[0] = torch.nan
    mixture = forward(spoilt, weights, ids)
    assert mixture[0].isnan().all()
    torch.testing.assert_close(mixture[1:], expected[1:])


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_experts_are_what_the_engine_computes(activation: str, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
        from sglang.srt.layers.moe.topk import StandardTopKOutput
    layer, config = _make_layer(dtype), _make_config(activation)
    hidden_states, weights, ids = _make_batch()
    hidden_states = hidden_states.to(dtype)
    slots = StandardTopKOutput(weights, ids, None)
    expected = moe_forward_native(layer, hidden_states, slots, config)
    experts = gated_experts(layer, config)
    assert experts is not None
    found = forward_gated_experts(experts, hidden_states, weights, ids)
    torch.testing.assert_close(
        found, expected, rtol=0.02, atol=0.02 if dtype.itemsize == 2 else 1e-5
    )


@pytest.mark.parametrize(
    ("layer", "config"),
    [
        (_make_layer(), _make_config("situ")),
        (_make_layer(), _make_config(gemm1_alpha=1.7)),
        (_make_layer(), _make_config(gemm1_clamp_limit=7.0)),
        (_make_layer(w13_weight_bias=torch.zeros(EXPERTS, 2 * INTERMEDIATE)), _make_config()),
        (_make_layer(w2_weight_bias=torch.zeros(EXPERTS, HIDDEN)), _make_config()),
    ],
    ids=["activation", "alpha", "clamp", "w13 bias", "w2 bias"],
)
def test_experts_of_another_kind_are_left_to_the_engine(layer: Any, config: Any) -> None:
    assert gated_experts(layer, config) is None
