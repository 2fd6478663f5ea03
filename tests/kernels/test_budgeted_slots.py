"""Modes `layer` and `threshold` after SGLang's routing: the kernel against its twin, and facts."""

from __future__ import annotations

import pytest
import torch
from slot_cases import CASES, SlotCase, assert_same, make_rows, make_slots

from sglang_alloc_kernels.budgeted_slots import Rule, budgeted_slots, budgeted_slots_torch
from sglang_alloc_kernels.layer_rows import LayerRows, StepTensors

PLAIN = SlotCase("plain", "nothing is odd")


def _same(case: SlotCase, device: str, rule: Rule, rows: LayerRows, bounds: bool = False) -> None:
    assert_same(budgeted_slots, budgeted_slots_torch, case, device, rows, rule, bounds=bounds)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("rule", "limit"), [("quota", 2.0), ("threshold", 0.1)])
def test_kernel_equals_its_twin(case: SlotCase, rule: Rule, limit: float, device: str) -> None:
    _same(case, device, rule, make_rows(case, limit))


@pytest.mark.parametrize("quota", [1.0, 2.0, 2.5, 6.0])
def test_kernel_equals_its_twin_at_every_quota(quota: float, device: str) -> None:
    _same(PLAIN, device, "quota", make_rows(PLAIN, quota))


@pytest.mark.parametrize("threshold", [float("-inf"), 0.0, 2.0])
def test_kernel_equals_its_twin_at_extreme_thresholds(threshold: float, device: str) -> None:
    _same(PLAIN, device, "threshold", make_rows(PLAIN, threshold))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_equals_its_twin_with_every_correction_and_bound(
    case: SlotCase, device: str
) -> None:
    rows = make_rows(case, 2.0, gain=1.25, reference=3.0, saliency=True)
    _same(case, device, "quota", rows, bounds=True)


def test_full_quota_leaves_ids_and_weights_bit_for_bit(device: str) -> None:
    weights, ids = (tensor.to(device) for tensor in make_slots(PLAIN))
    rows = LayerRows(torch.tensor([6.0], device=device), torch.tensor([1.0], device=device))
    kept_weights, kept_ids = budgeted_slots(weights, ids, rows, 0, "quota")
    assert torch.equal(kept_weights, weights)
    assert torch.equal(kept_ids, ids)


def test_a_changed_row_counts_at_the_next_call_without_new_arguments(device: str) -> None:
    weights, ids = (tensor.to(device) for tensor in make_slots(PLAIN))
    rows = LayerRows(torch.tensor([6.0], device=device))
    kept = []
    for quota in (6.0, 1.0):
        rows.limits.fill_(quota)
        kept.append(int((budgeted_slots(weights, ids, rows, 0, "quota")[1] >= 0).sum()))
    assert kept == [54, 9]


def test_a_protected_token_keeps_all_slots_at_the_routers_weights(device: str) -> None:
    weights, ids = (tensor.to(device) for tensor in make_slots(PLAIN))
    floors = torch.zeros(9, dtype=torch.int32, device=device)
    floors[4] = 6
    rows = LayerRows(torch.tensor([1.0], device=device), torch.tensor([1.5], device=device))
    kept_weights, kept_ids = budgeted_slots(
        weights, ids, rows, 0, "quota", step=StepTensors(floors=floors)
    )
    assert torch.equal(kept_weights[4], weights[4])
    assert (kept_ids >= 0).sum(dim=1).tolist() == [1, 1, 1, 1, 6, 1, 1, 1, 1]


def test_a_ceiling_limits_a_token_under_a_full_budget(device: str) -> None:
    weights, ids = (tensor.to(device) for tensor in make_slots(PLAIN))
    ceilings = torch.full((9,), 6, dtype=torch.int32, device=device)
    ceilings[0] = 2
    rows = LayerRows(torch.tensor([6.0], device=device))
    kept_ids = budgeted_slots(weights, ids, rows, 0, "quota", step=StepTensors(ceilings=ceilings))[
        1
    ]
    assert (kept_ids >= 0).sum(dim=1).tolist() == [2, *[6] * 8]


def test_reference_one_normalises_over_what_was_kept(device: str) -> None:
    weights, ids = (tensor.to(device) for tensor in make_slots(PLAIN))
    ones = torch.tensor([1.0], device=device)
    rows = LayerRows(2 * ones, references=ones)
    kept_weights, _ = budgeted_slots(weights, ids, rows, 0, "quota")
    torch.testing.assert_close(kept_weights.sum(dim=1), weights.sum(dim=1))


def test_padding_lights_no_expert_and_counts_for_nothing(device: str) -> None:
    case = SlotCase("padding", "", padding=9, num_shared=1)
    weights, ids = assert_same(
        budgeted_slots, budgeted_slots_torch, case, device, make_rows(case, 6.0), "quota"
    )
    assert (ids == -1).all()
    assert (weights == 0).all()
