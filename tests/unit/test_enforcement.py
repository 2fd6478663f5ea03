"""Both implementations of the budget: what they keep, and that they agree with each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sglang_alloc.enforcement import Enforcement, EnforcementTables, PhaseRows, RoutedSlots
from sglang_alloc.enforcement_device import DeviceEnforcement
from sglang_alloc.enforcement_host import HostEnforcement
from sglang_alloc_kernels.slot_rules import TWINS

LAYERS, TOP_K, EXPERTS, TOKENS = 3, 4, 16, 24
BUDGET_MIN, BUDGET_MAX = LAYERS, LAYERS * TOP_K


def _on_device(tables: EnforcementTables) -> DeviceEnforcement:
    """What serves on a device, on the CPU: nothing can launch kernels here, so with their twins."""
    return DeviceEnforcement(tables, torch.device("cpu"), TWINS)


def _make_tables(mode: str, *, gains: bool = False, saliency: bool = False) -> EnforcementTables:
    """Quotas as even as the budget allows; thresholds that fall as the budget grows."""
    budgets = np.arange(BUDGET_MIN, BUDGET_MAX + 1)
    quotas = (budgets[:, None] + np.arange(LAYERS)) // LAYERS
    falling = np.linspace(0.5, 0.0, len(budgets), dtype=np.float32)
    thresholds = np.repeat(falling[:, None], LAYERS, axis=1)
    rows = PhaseRows(
        quotas.astype(np.int16), thresholds, np.full_like(thresholds, 1.5) if gains else None
    )
    per_expert = np.linspace(0.5, 1.5, EXPERTS, dtype=np.float32)
    return EnforcementTables(
        mode=mode,  # type: ignore[arg-type]
        top_k=TOP_K,
        budget_min=BUDGET_MIN,
        budget_max=BUDGET_MAX,
        prefill=rows,
        decode=rows,
        saliency=np.stack([per_expert] * LAYERS) if saliency else None,
        num_experts=EXPERTS,
    )


def _make_slots(num_shared: int = 0) -> RoutedSlots:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    weights, ids = logits.softmax(dim=1).topk(TOP_K, dim=1)
    if num_shared:
        weights = torch.cat([weights, torch.ones(TOKENS, num_shared)], dim=1)
        ids = torch.cat([ids, torch.full((TOKENS, num_shared), EXPERTS)], dim=1)
    return RoutedSlots(weights, ids.int(), num_shared)


def _kept(enforcement: Enforcement, budget: int, slots: RoutedSlots) -> torch.Tensor:
    enforcement.set_budgets(budget, budget)
    enforcement.begin_forward("decode")
    return enforcement.drop(0, slots).ids >= 0


@pytest.mark.parametrize("mode", ["layer", "token", "threshold"])
def test_a_full_budget_on_the_host_returns_the_same_object(mode: str) -> None:
    enforcement, slots = HostEnforcement(_make_tables(mode)), _make_slots()
    enforcement.begin_forward("prefill")
    assert enforcement.drop(0, slots) is slots
    assert not enforcement.drops_slots()


@pytest.mark.parametrize("mode", ["layer", "token", "threshold"])
@pytest.mark.parametrize("gains", [False, True])
def test_a_full_budget_on_a_device_changes_no_bit(mode: str, gains: bool) -> None:
    enforcement = _on_device(_make_tables(mode, gains=gains))
    slots = _make_slots()
    enforcement.begin_forward("decode")
    after = enforcement.drop(1, slots)
    assert torch.equal(after.weights, slots.weights)
    assert torch.equal(after.ids, slots.ids)


@pytest.mark.parametrize("mode", ["layer", "token", "threshold"])
@pytest.mark.parametrize("saliency", [False, True])
def test_host_and_device_keep_the_same_slots_at_every_budget(mode: str, saliency: bool) -> None:
    tables, slots = _make_tables(mode, saliency=saliency), _make_slots()
    host, device = HostEnforcement(tables), _on_device(tables)
    for budget in range(BUDGET_MIN, BUDGET_MAX + 1):
        assert torch.equal(_kept(host, budget, slots), _kept(device, budget, slots))


@pytest.mark.parametrize("mode", ["layer", "token"])
def test_the_mean_of_kept_slots_is_the_quota(mode: str) -> None:
    enforcement, slots = HostEnforcement(_make_tables(mode)), _make_slots()
    assert int(_kept(enforcement, 2 * LAYERS, slots).sum()) == 2 * TOKENS


def test_prefill_and_decode_obey_their_own_budgets() -> None:
    enforcement, slots = HostEnforcement(_make_tables("layer")), _make_slots()
    enforcement.set_budgets(prefill_budget=LAYERS, decode_budget=3 * LAYERS)
    enforcement.begin_forward("prefill")
    prefill = enforcement.drop(0, slots).ids
    enforcement.begin_forward("decode")
    decode = enforcement.drop(0, slots).ids
    assert ((prefill >= 0).sum(dim=1) == 1).all()
    assert ((decode >= 0).sum(dim=1) == 3).all()


@pytest.mark.parametrize("make", [HostEnforcement, _on_device])
def test_shared_expert_columns_are_never_dropped(make: type[HostEnforcement]) -> None:
    slots = _make_slots(num_shared=2)
    enforcement = make(_make_tables("layer"))
    enforcement.set_budgets(BUDGET_MIN, BUDGET_MIN)
    enforcement.begin_forward("decode")
    after = enforcement.drop(0, slots)
    assert torch.equal(after.ids[:, TOP_K:], slots.ids[:, TOP_K:])
    assert torch.equal(after.weights[:, TOP_K:], slots.weights[:, TOP_K:])
    assert ((after.ids[:, :TOP_K] >= 0).sum(dim=1) == 1).all()


@pytest.mark.parametrize("make", [HostEnforcement, _on_device])
def test_gains_scale_the_kept_weights(make: type[HostEnforcement]) -> None:
    slots = _make_slots()
    enforcement = make(_make_tables("layer", gains=True))
    enforcement.set_budgets(BUDGET_MIN, BUDGET_MIN)
    enforcement.begin_forward("decode")
    after = enforcement.drop(0, slots)
    kept = after.ids >= 0
    assert torch.allclose(after.weights[kept], slots.weights[kept] * 1.5)


def test_what_a_graph_recorded_follows_the_budgets_set_later() -> None:
    """A captured graph replays kernels, not Python: tracing stands in for capture on a CPU."""
    enforcement, slots = _on_device(_make_tables("layer")), _make_slots()

    def route(weights: torch.Tensor) -> torch.Tensor:
        return enforcement.drop(0, RoutedSlots(weights, slots.ids, 0)).ids

    recorded = make_fx(route)(slots.weights)
    for budget in (BUDGET_MIN, 2 * LAYERS, BUDGET_MAX):
        enforcement.set_budgets(budget, budget)
        enforcement.begin_forward("decode")
        assert ((recorded(slots.weights) >= 0).sum(dim=1) == budget // LAYERS).all()


@pytest.mark.parametrize(
    ("largest", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (11, [1, 2, 4, 8, 16])]
)
def test_every_size_that_a_kernel_is_compiled_for_runs_before_the_first_request(
    largest: int, expected: list[int]
) -> None:
    """Eleven rows are a tile of sixteen: nothing may be compiled while a graph is captured."""
    sizes = []

    def budgeted(weights: torch.Tensor, *given: Any, **named: Any) -> Any:
        sizes.append(len(weights))
        return TWINS.budgeted(weights, *given, **named)

    rules = TWINS._replace(budgeted=budgeted)
    enforcement = DeviceEnforcement(_make_tables("layer"), torch.device("cpu"), rules)
    enforcement.prepare(_make_slots(), largest)
    assert sizes == 2 * expected  # once for each phase


def test_the_device_buffers_keep_their_addresses_through_changes() -> None:
    enforcement = _on_device(_make_tables("layer"))
    enforcement.begin_forward("decode")
    before = enforcement.addresses()
    enforcement.set_budgets(BUDGET_MIN, BUDGET_MIN + 1)
    enforcement.begin_forward("prefill")
    assert enforcement.addresses() == before
