"""Reference renormalisation: between normalising over what was kept and not normalising at all."""

import pytest
import torch

from sglang_alloc_kernels.kept_slots import ScoredSlots, finish_slots_torch
from sglang_alloc_kernels.layer_rows import NO_STEP_TENSORS, LayerRows
from sglang_alloc_kernels.reference_mass import reference_factor_torch
from sglang_alloc_kernels.slot_rank import slot_rank_torch

WEIGHTS = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
KEPT = torch.tensor([[True, True, False, False]])


@pytest.mark.parametrize(
    ("reference", "factor"), [(1, 1 / 0.7), (2, 1 / 0.7), (3, 1 / 0.9), (4, 1.0)]
)
def test_the_reference_s_mass_is_what_the_kept_weights_are_divided_by(
    reference: int, factor: float
) -> None:
    found = reference_factor_torch(WEIGHTS, KEPT, WEIGHTS, reference)
    torch.testing.assert_close(found, torch.tensor([[factor]]))


def test_slots_are_ranked_by_score_and_kept_ones_always_count() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    found = reference_factor_torch(WEIGHTS, KEPT, scores, 1)
    torch.testing.assert_close(found, torch.tensor([[1 / 0.8]]))


def test_a_padding_row_stays_as_it_is() -> None:
    nothing = torch.zeros(1, 4)
    assert reference_factor_torch(nothing, nothing > 1, nothing, 2).item() == 1.0


def test_a_nan_weighs_nothing_and_leaves_its_neighbours_as_they_are() -> None:
    weights = torch.tensor([[0.4, float("nan"), 0.2, 0.2], [float("nan")] * 4])
    kept = torch.tensor([[True, False, False, False], [True] * 4])
    found = reference_factor_torch(weights, kept, weights, 2)
    torch.testing.assert_close(found, torch.tensor([[0.8 / 0.6], [1.0]]))


@pytest.mark.parametrize("reference", [1, 2, 3, 5, 6])
def test_it_agrees_with_the_rule_that_serves_on_accelerators(reference: int) -> None:
    torch.manual_seed(0)
    weights, ids = torch.rand(50, 16).softmax(1).topk(6)
    scores = weights * torch.rand(50, 6)
    kept = (torch.rand(50, 6) > 0.5) | (slot_rank_torch(scores) == 0)
    slots = ScoredSlots(weights, ids, scores, slot_rank_torch(scores))
    rows = LayerRows(torch.zeros(1), references=torch.tensor([float(reference)]))
    expected, _ = finish_slots_torch(slots, kept, rows, 0, NO_STEP_TENSORS)
    factor = reference_factor_torch(weights, kept, scores, torch.tensor(float(reference)))
    torch.testing.assert_close((weights * factor).masked_fill(~kept, 0.0), expected)
