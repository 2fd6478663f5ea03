"""The torch twins of the allocation modes, on cases computable by hand and on edge cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_alloc_kernels.drop_slots import drop_slots_torch
from sglang_alloc_kernels.layer_quota import layer_quota_torch
from sglang_alloc_kernels.score_threshold import score_threshold_torch
from sglang_alloc_kernels.slot_rank import slot_rank_torch
from sglang_alloc_kernels.token_selection import token_selection_torch

NAN = float("nan")

shapes = st.tuples(st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**31 - 1))


def _make_scores(tokens: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties are common.
    return torch.randint(1, 6, (tokens, top_k), generator=generator).float() / 8


def test_rank_orders_by_score_and_breaks_ties_by_slot() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.4, 0.2]])
    assert slot_rank_torch(scores).tolist() == [[3, 0, 1, 2]]


def test_rank_puts_nan_last() -> None:
    assert slot_rank_torch(torch.tensor([[NAN, 0.1, 0.2]])).tolist() == [[2, 1, 0]]


@given(shapes)
def test_rank_is_a_permutation_of_every_row(shape: tuple[int, int, int]) -> None:
    ranks = slot_rank_torch(_make_scores(*shape))
    assert torch.equal(ranks.sort(dim=1).values, torch.arange(shape[1]).expand_as(ranks))


@given(shapes, st.integers(1, 16))
def test_layer_quota_keeps_exactly_the_quota_of_every_token(
    shape: tuple[int, int, int], quota: int
) -> None:
    kept = layer_quota_torch(_make_scores(*shape), quota)
    assert (kept.sum(dim=1) == min(quota, shape[1])).all()


@given(shapes, st.integers(1, 16))
def test_layer_quota_keeps_no_slot_below_a_dropped_one(
    shape: tuple[int, int, int], quota: int
) -> None:
    scores = _make_scores(*shape)
    kept = layer_quota_torch(scores, quota)
    worst_kept = scores.masked_fill(~kept, 2.0).min(dim=1).values
    best_dropped = scores.masked_fill(kept, -1.0).max(dim=1).values
    assert (worst_kept >= best_dropped).all()


def test_layer_quota_reads_a_quota_from_a_tensor() -> None:
    scores = _make_scores(5, 4, seed=1)
    from_tensor = layer_quota_torch(scores, torch.tensor(2))
    assert torch.equal(from_tensor, layer_quota_torch(scores, 2))


@given(shapes, st.integers(1, 16), st.integers(0, 2**31 - 1))
def test_token_selection_keeps_exactly_quota_times_valid_tokens(
    shape: tuple[int, int, int], quota: int, seed: int
) -> None:
    quota = min(quota, shape[1])
    valid = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) < 0.7
    kept = token_selection_torch(_make_scores(*shape), quota, valid)
    assert int(kept.sum()) == quota * int(valid.sum())
    assert not kept[~valid].any()
    assert kept[valid].any(dim=1).all()


def test_token_selection_gives_the_spare_slots_to_the_token_that_needs_them() -> None:
    scores = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.3, 0.3]])
    kept = token_selection_torch(scores, quota=2)
    assert kept.tolist() == [[True, False, False], [True, True, True]]


def test_token_selection_of_one_token_is_its_layer_quota() -> None:
    scores = _make_scores(1, 8, seed=4)
    assert torch.equal(token_selection_torch(scores, 3), layer_quota_torch(scores, 3))


def test_token_selection_of_padding_only_keeps_nothing() -> None:
    kept = token_selection_torch(_make_scores(4, 8, seed=4), 3, torch.zeros(4, dtype=torch.bool))
    assert not kept.any()


@given(shapes, st.floats(0, 1))
def test_threshold_keeps_what_passes_and_always_the_best_slot(
    shape: tuple[int, int, int], threshold: float
) -> None:
    scores = _make_scores(*shape)
    kept = score_threshold_torch(scores, threshold)
    assert kept.gather(1, scores.argmax(dim=1, keepdim=True)).all()
    passed = scores >= threshold
    assert (kept & ~passed).sum(dim=1).max() <= 1
    assert (kept | ~passed).all()


def test_threshold_decides_each_token_from_that_token_alone() -> None:
    scores = _make_scores(32, 8, seed=9)
    alone = torch.cat([score_threshold_torch(row[None], 0.4) for row in scores])
    assert torch.equal(alone, score_threshold_torch(scores, 0.4))


def test_threshold_leaves_a_row_of_nan_to_the_router() -> None:
    assert score_threshold_torch(torch.full((1, 4), NAN), 0.1).all()
    assert score_threshold_torch(torch.full((1, 4), NAN), float("-inf")).all()


def test_dropped_slots_get_id_minus_one_and_weight_zero_and_the_inputs_stay() -> None:
    weights, ids = torch.tensor([[0.5, 0.3]]), torch.tensor([[7, 2]])
    new_weights, new_ids = drop_slots_torch(weights, ids, torch.tensor([[True, False]]))
    assert new_weights.tolist() == [[0.5, 0.0]]
    assert new_ids.tolist() == [[7, -1]]
    assert ids.tolist() == [[7, 2]]
    assert weights.tolist() == [[0.5, pytest.approx(0.3)]]
