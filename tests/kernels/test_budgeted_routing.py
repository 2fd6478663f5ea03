"""Routing from logits on, in modes `layer`, `threshold` and `union`: kernels against twins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from slot_cases import LAYER, NAN, SlotCase, assert_same_sums, make_rows, make_step, on

from sglang_alloc_kernels.budgeted_routing import (
    Router,
    budgeted_routing,
    budgeted_routing_torch,
)
from sglang_alloc_kernels.budgeted_slots import budgeted_slots_torch
from sglang_alloc_kernels.layer_rows import LayerRows
from sglang_alloc_kernels.union_routing import union_routing, union_routing_torch

# (experts, router) with the reason each shape is here.
SHAPES = {
    "softmax of few experts": (8, Router(2, "softmax")),
    "weights that stay as they are, E no power of two": (60, Router(6, "softmax", False)),
    "groups of 20 experts": (160, Router(6, "softmax", False, 8, 3, 16.0)),
    "sigmoid in groups of 32, 256 experts": (256, Router(8, "sigmoid", True, 8, 4, 2.5)),
    "512 experts in two warps, K no power of two": (512, Router(10, "softmax")),
    "K = E": (8, Router(8, "sigmoid")),
    "K = 1": (16, Router(1, "softmax")),
}
TOKENS = 5


def _logits(num_experts: int, distinct: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_experts)
    if distinct is None:
        return torch.randn(TOKENS, num_experts, generator=generator)
    return torch.randint(0, distinct, (TOKENS, num_experts), generator=generator) / 4 - 1


def _same(
    kernel: Callable[..., Any],
    twin: Callable[..., Any],
    logits: torch.Tensor,
    router: Router,
    rows: LayerRows,
    *rule: str,
    device: str,
    bias: torch.Tensor | None = None,
    bounds: bool = False,
    padding: int = 1,
) -> torch.Tensor:
    """Compare both on logits with rows of padding; return the kernel's ids."""
    case = SlotCase("", "", len(logits), router.top_k, logits.shape[1], padding=padding)
    theirs, ours = make_step(case, bounds=bounds), on(device, make_step(case, bounds=bounds))
    expected_weights, expected_ids = twin(
        logits, router, rows, LAYER, *rule, correction_bias=bias, step=theirs
    )
    arguments = on(device, (logits, router, rows))
    weights, ids = kernel(*arguments, LAYER, *rule, correction_bias=on(device, bias), step=ours)
    assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu(), expected_weights, equal_nan=True)
    assert_same_sums(ours, theirs)
    return ids.cpu()


def _rows(logits: torch.Tensor, limit: float, **corrections: Any) -> LayerRows:
    return make_rows(SlotCase("", "", num_experts=logits.shape[1]), limit, **corrections)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_kernel_equals_its_twin(name: str, biased: bool, device: str) -> None:
    num_experts, router = SHAPES[name]
    logits = _logits(num_experts)
    bias = _logits(num_experts)[0].flip(0) / 4 if biased else None
    rows = _rows(logits, min(2.0, router.top_k))
    _same(
        *(budgeted_routing, budgeted_routing_torch, logits, router, rows, "quota"),
        device=device,
        bias=bias,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_kernel_equals_its_twin_on_ties_with_every_correction_and_bound(
    name: str, device: str
) -> None:
    num_experts, router = SHAPES[name]
    logits = _logits(num_experts, distinct=4)
    rows = _rows(logits, 0.05, gain=1.25, reference=2.0, saliency=True)
    _same(
        *(budgeted_routing, budgeted_routing_torch, logits, router, rows, "threshold"),
        device=device,
        bounds=True,
    )


@pytest.mark.parametrize(
    ("quota", "tokens", "padding"),
    [(1.0, 5, 0), (2.5, 5, 0), (6.0, 5, 0), (3.0, 1, 0), (3.0, 5, 5)],
    ids=["quota 1", "a fraction", "quota K", "one token", "all padding"],
)
def test_kernel_equals_its_twin_at_the_edges(
    quota: float, tokens: int, padding: int, device: str
) -> None:
    num_experts, router = SHAPES["groups of 20 experts"]
    logits = _logits(num_experts)[:tokens]
    ids = _same(
        *(budgeted_routing, budgeted_routing_torch, logits, router, _rows(logits, quota), "quota"),
        device=device,
        padding=padding,
    )
    assert int((ids >= 0).sum()) == (tokens - padding) * math.ceil(quota)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_row_of_nan_chooses_the_first_experts_and_leaves_its_neighbours_alone(
    scoring: Any, renormalize: bool, device: str
) -> None:
    logits, router = _logits(16), Router(3, scoring, renormalize)
    broken = logits.clone()
    broken[1] = NAN
    rows = _rows(logits, 2.0)
    kernel, twin = budgeted_routing, budgeted_routing_torch
    found = _same(kernel, twin, broken, router, rows, "quota", device=device)
    healthy = _same(kernel, twin, logits, router, rows, "quota", device=device)
    assert found[1].tolist() == [0, 1, -1]
    assert torch.equal(found[[0, 2, 3]], healthy[[0, 2, 3]])


def test_routing_then_dropping_is_the_same_as_both_at_once() -> None:
    logits, router = _logits(60), Router(6, "softmax")
    rows = _rows(logits, 2.0)
    everything = _rows(logits, 6.0)
    weights, ids = budgeted_routing_torch(logits, router, everything, LAYER, "quota")
    apart = budgeted_slots_torch(weights, ids, rows, LAYER, "quota")
    at_once = budgeted_routing_torch(logits, router, rows, LAYER, "quota")
    assert torch.equal(apart[0], at_once[0])
    assert torch.equal(apart[1], at_once[1])


def test_no_token_leaves_nothing_to_launch(device: str) -> None:
    logits = torch.empty(0, 16, device=device)
    rows = LayerRows(torch.ones(1, device=device))
    weights, ids = budgeted_routing(logits, Router(4), rows, 0, "quota")
    assert weights.shape == ids.shape == (0, 4)


@pytest.mark.parametrize("name", SHAPES)
def test_union_routing_equals_its_twin(name: str, device: str) -> None:
    num_experts, router = SHAPES[name]
    logits = _logits(num_experts)
    rows = _rows(logits, 1.0)
    _same(union_routing, union_routing_torch, logits, router, rows, device=device)


def test_union_routing_equals_its_twin_where_a_threshold_opens_the_set(device: str) -> None:
    logits = _logits(60)
    rows = _rows(logits, 0.08)
    _same(union_routing, union_routing_torch, logits, Router(6), rows, "threshold", device=device)


def test_union_routing_gives_every_token_its_best_experts_of_the_set(device: str) -> None:
    logits = _logits(16)
    rows = _rows(logits, 2.0)
    ids = _same(union_routing, union_routing_torch, logits, Router(4), rows, device=device)[:-1]
    opened = set(logits[:-1].topk(2).indices.flatten().tolist())
    assert set(ids.flatten().tolist()) <= opened
    inside = logits[:-1].clone()
    inside[:, [e for e in range(16) if e not in opened]] = float("-inf")
    assert torch.equal(ids.sort(dim=1).values.long(), inside.topk(4).indices.sort(dim=1).values)


def test_fewer_open_experts_than_slots_leave_slots_absent(device: str) -> None:
    logits = _logits(16)[:1].repeat(TOKENS, 1)
    rows = _rows(logits, 1.0)
    ids = _same(union_routing, union_routing_torch, logits, Router(4), rows, device=device)
    assert (ids[0] >= 0).tolist() == [True, False, False, False]
