"""Mode `union` after SGLang's routing: the kernel against its twin, and the laws of the set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slot_cases import CASES, LAYER, SlotCase, assert_same, make_rows, make_slots, on

from sglang_alloc_kernels import union_slots, union_tiles
from sglang_alloc_kernels.budgeted_slots import budgeted_slots
from sglang_alloc_kernels.layer_rows import LayerRows, StepTensors
from sglang_alloc_kernels.slot_rank import slot_rank_torch
from sglang_alloc_kernels.union_selection import union_selection_torch
from sglang_alloc_kernels.union_slots import union_slots_torch

PLAIN = SlotCase("plain", "riders and outsiders are both common", 13, 6, 24)
shapes = st.tuples(st.integers(1, 24), st.integers(1, 8), st.integers(0, 2**31 - 1))


@pytest.fixture(params=["one program", "several programs"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let small batches take both ways, the one of large batches by 4 tokens a program."""
    if request.param == "several programs":
        monkeypatch.setattr(union_slots, "PAIRS_AT_ONCE", 0)
        monkeypatch.setattr(union_tiles, "tokens_per_program", lambda *_: 4)
    return str(request.param)


def _same(
    case: SlotCase, device: str, rows: LayerRows, *rule: str, bounds: bool = False
) -> torch.Tensor:
    return assert_same(
        *(union_slots.union_slots, union_slots_torch, case, device, rows, case.num_experts),
        *rule,
        bounds=bounds,
    )[1]


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_equals_its_twin(case: SlotCase, device: str) -> None:
    _same(case, device, make_rows(case, 2.0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_equals_its_twin_with_a_cap_and_every_correction_and_bound(
    case: SlotCase, device: str
) -> None:
    cap = 0.7 * case.num_experts
    rows = make_rows(case, 1.0, cap=cap, gain=1.25, reference=1.0, saliency=True)
    _same(case, device, rows, bounds=True)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_equals_its_twin_with_every_correction_and_bound(
    case: SlotCase, device: str
) -> None:
    rows = make_rows(case, 2.0, gain=1.25, reference=1.0, saliency=True)
    _same(case, device, rows, bounds=True)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_equals_its_twin_where_a_threshold_opens_the_set(
    case: SlotCase, device: str
) -> None:
    rows = make_rows(case, 0.7 / case.top_k, reference=2.0, saliency=True)
    _same(case, device, rows, "threshold")


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("cap", [None, 20.0])
def test_thresholds_obey_floors_ceilings_and_caps(cap: float | None, device: str) -> None:
    rows = make_rows(PLAIN, 0.12, cap=cap, gain=1.25, reference=1.0, saliency=True)
    _same(PLAIN, device, rows, "threshold", bounds=True)


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.15, 0.2])
def test_a_threshold_opens_exactly_the_experts_that_it_would_keep(
    limit: float, device: str
) -> None:
    weights, ids = on(device, make_slots(PLAIN))
    rows = on(device, make_rows(PLAIN, limit, saliency=True))
    alone = budgeted_slots(weights, ids, rows, LAYER, "threshold")[1]
    kept = union_slots.union_slots(weights, ids, rows, LAYER, PLAIN.num_experts, "threshold")[1]
    assert torch.equal(kept[kept >= 0].unique(), alone[alone >= 0].unique())
    assert torch.equal(kept[alone >= 0], alone[alone >= 0])
    assert int((kept >= 0).sum()) >= int((alone >= 0).sum())
    assert (kept >= 0).any(dim=1).all()


@pytest.mark.parametrize("cap", [1.0, 12.0, 20.0, 24.0, 99.0])
def test_kernel_equals_its_twin_at_every_cap(cap: float, device: str) -> None:
    _same(PLAIN, device, make_rows(PLAIN, 1.0, cap=cap))


def test_tokens_beyond_one_chunk_share_the_set_of_all(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(union_slots, "PAIRS_AT_ONCE", 4 * 8 * 8)
    _same(PLAIN, device, make_rows(PLAIN, 1.0, cap=20.0))


def test_more_tokens_than_one_program_holds_take_the_way_of_several(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """129 tokens of top-8, nearly all of which tell on the set that the first one sees."""
    ways: list[int] = []
    over_tiles = union_tiles.union_over_tiles

    def noted(arguments: tuple[object, ...], constants: dict[str, object], tokens: int) -> None:
        ways.append(tokens)
        over_tiles(arguments, constants, tokens)

    monkeypatch.setattr(union_slots, "union_over_tiles", noted)
    for tokens in (128, 129):
        case = SlotCase("large", "more than one program's", tokens, 8, 256, padding=3)
        _same(case, device, make_rows(case, 1.0))
    assert ways == [129]


@pytest.mark.usefixtures("programs")
def test_a_slot_rides_when_another_token_opened_its_expert(device: str) -> None:
    weights = torch.tensor([[0.6, 0.4], [0.9, 0.1]], device=device)
    ids = torch.tensor([[3, 5], [1, 3]], dtype=torch.int32, device=device)
    rows = LayerRows(torch.tensor([1.0], device=device))
    kept = union_slots.union_slots(weights, ids, rows, 0, 8)[1]
    assert kept.tolist() == [[3, -1], [1, 3]]


def test_a_protected_token_opens_the_set_with_all_its_slots(device: str) -> None:
    weights, ids = on(device, make_slots(PLAIN))
    floors = torch.zeros(13, dtype=torch.int32, device=device)
    floors[2] = 6
    rows = LayerRows(torch.tensor([1.0], device=device))
    step = StepTensors(floors=floors)
    kept_weights, kept_ids = union_slots.union_slots(weights, ids, rows, 0, 24, step=step)
    assert torch.equal(kept_ids[2], ids[2])
    assert torch.equal(kept_weights[2], weights[2])


def _draw(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, top_k, seed = shape
    return make_slots(SlotCase("", "", tokens, top_k, 16, distinct_weights=9), seed)


@given(shapes, st.integers(1, 8))
def test_the_set_is_exactly_what_the_best_slots_opened(
    shape: tuple[int, int, int], opening: int
) -> None:
    scores, ids = _draw(shape)
    kept = union_selection_torch(scores, ids, opening, 16)
    opened = set(ids[slot_rank_torch(scores) < opening].tolist())
    assert set(ids[kept].tolist()) == opened
    assert not opened & set(ids[~kept].tolist())


@given(shapes, st.integers(1, 3), st.integers(0, 20))
def test_a_cap_is_filled_but_never_takes_a_guaranteed_slot(
    shape: tuple[int, int, int], opening: int, cap: int
) -> None:
    scores, ids = _draw(shape)
    kept = union_selection_torch(scores, ids, opening, 16, cap=cap)
    best = slot_rank_torch(scores) < opening
    assert kept[best].all()
    guaranteed, routed = len(ids[best].unique()), len(ids.unique())
    assert len(ids[kept].unique()) == max(guaranteed, min(cap, routed))


@given(shapes)
def test_a_cap_takes_the_heaviest_experts_first(shape: tuple[int, int, int]) -> None:
    scores, ids = _draw(shape)
    kept = union_selection_torch(scores, ids, 0, 16, cap=4)
    mass = torch.zeros(16, dtype=torch.float64)
    mass.scatter_add_(0, ids.flatten().long(), scores.double().flatten())
    taken = ids[kept].unique().long()
    left = torch.tensor(sorted(set(ids.unique().tolist()) - set(taken.tolist())), dtype=torch.long)
    if len(left):
        assert mass[taken].min() >= mass[left].max() - 1e-5
