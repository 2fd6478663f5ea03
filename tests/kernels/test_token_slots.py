"""Mode `token` after SGLang's routing: one program and several, against the twin; and facts."""

from __future__ import annotations

import pytest
import torch
from slot_cases import CASES, SlotCase, assert_same, make_rows, make_slots

from sglang_alloc_kernels import token_contest, token_slots
from sglang_alloc_kernels.layer_rows import LayerRows, StepTensors
from sglang_alloc_kernels.token_slots import token_slots_torch

TIED = SlotCase("tied", "ties cross every border between programs", 37, 6, distinct_weights=4)


@pytest.fixture
def several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make even small batches take the way of a long prefill, 8 tokens a program."""
    monkeypatch.setattr(token_slots, "ONE_PROGRAM_SLOTS", 0)
    monkeypatch.setattr(token_contest, "tokens_per_program", lambda *_: 8)


def _same(case: SlotCase, device: str, rows: LayerRows, bounds: bool = False) -> torch.Tensor:
    return assert_same(
        token_slots.token_slots, token_slots_torch, case, device, rows, bounds=bounds
    )[1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_equals_its_twin(case: SlotCase, device: str) -> None:
    _same(case, device, make_rows(case, min(2.0, case.top_k)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_equals_its_twin_with_every_correction_and_bound(
    case: SlotCase, device: str
) -> None:
    rows = make_rows(case, min(2.0, case.top_k), gain=1.25, reference=3.0, saliency=True)
    _same(case, device, rows, bounds=True)


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_several_programs_equal_the_twin(case: SlotCase, device: str) -> None:
    _same(case, device, make_rows(case, min(2.0, case.top_k)))


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("quota", [1.0, 2.37, 6.0])
def test_several_programs_equal_the_twin_on_ties_and_bounds(quota: float, device: str) -> None:
    _same(TIED, device, make_rows(TIED, quota, saliency=False), bounds=True)


@pytest.mark.parametrize("quota", [1.0, 1.5, 2.37, 6.0])
def test_it_keeps_exactly_the_quota_times_the_tokens_rounded_down(
    quota: float, device: str
) -> None:
    ids = _same(TIED, device, make_rows(TIED, quota))
    assert int((ids >= 0).sum()) == int(quota * 37)


def test_a_protected_token_leaves_the_others_exactly_their_own_budget(device: str) -> None:
    weights, ids = (tensor.to(device) for tensor in make_slots(TIED))
    floors = torch.zeros(37, dtype=torch.int32, device=device)
    floors[5] = 6
    rows = LayerRows(torch.tensor([2.0], device=device))
    kept = token_slots.token_slots(weights, ids, rows, 0, step=StepTensors(floors=floors))[1] >= 0
    others = torch.arange(37) != 5
    assert kept[5].all()
    assert int(kept[others.to(device)].sum()) == 2 * 36
    alone = token_slots.token_slots(weights[others], ids[others], rows, 0)[1] >= 0
    assert torch.equal(kept[others.to(device)], alone)


@pytest.mark.parametrize("quota", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("ceiling", [1, 3])
def test_a_ceiling_takes_no_slot_from_the_others_and_gives_them_none(
    quota: float, ceiling: int, device: str
) -> None:
    weights, ids = (tensor.to(device) for tensor in make_slots(TIED))
    weights[5] += 10  # it would win every contest
    ceilings = torch.full((37,), 6, dtype=torch.int32, device=device)
    ceilings[5] = ceiling
    rows = LayerRows(torch.tensor([quota], device=device))
    step = StepTensors(ceilings=ceilings)
    kept = token_slots.token_slots(weights, ids, rows, 0, step=step)[1] >= 0
    others = (torch.arange(37) != 5).to(device)
    alone = token_slots.token_slots(weights[others], ids[others], rows, 0)[1] >= 0
    assert torch.equal(kept[others], alone)
    assert int(kept[others].sum()) == int(quota * 36)
    assert int(kept[5].sum()) == min(ceiling, int(quota))


def test_of_equal_scores_the_earlier_token_wins(device: str) -> None:
    weights = torch.full((3, 4), 0.25, device=device)
    ids = torch.arange(12, dtype=torch.int32, device=device).view(3, 4)
    rows = LayerRows(torch.tensor([2.0], device=device))
    kept = token_slots.token_slots(weights, ids, rows, 0)[1] >= 0
    assert kept.tolist() == [[True] * 4, [True] + [False] * 3, [True] + [False] * 3]
