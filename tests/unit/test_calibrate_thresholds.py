"""From recorded scores to thresholds that keep what the quotas ask for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_alloc.calibrate_thresholds import (
    MeanQuotas,
    Scores,
    anchor_rows,
    heldout_errors,
    solve_mean_quotas,
    thresholds_of,
)
from sglang_alloc.score_histogram import (
    BINS_PER_OCTAVE,
    LOWEST_OCTAVE,
    NUM_BINS,
    kept_on_average,
    threshold_of_quota,
)
from sglang_alloc.solve_bounds import QuotaBounds

TOKENS, TOP_K = 4000, 4


def _slots(seed: int, scale: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.sort(scale * random.lognormal(sigma=0.7, size=(TOKENS, TOP_K)), axis=1)


def _counts(slots: np.ndarray) -> np.ndarray:
    place = (np.log2(slots[:, :-1]) - LOWEST_OCTAVE) * BINS_PER_OCTAVE
    return np.bincount(place.astype(int).ravel(), minlength=NUM_BINS)


def _kept(slots: np.ndarray, threshold: float) -> float:
    return 1 + float((slots[:, :-1] >= threshold).sum()) / len(slots)


@given(st.floats(1.05, 3.95), st.integers(0, 5))
def test_a_threshold_keeps_its_quota_on_average(quota: float, seed: int) -> None:
    slots = _slots(seed)
    threshold = threshold_of_quota(_counts(slots), TOKENS, quota)
    assert _kept(slots, threshold) == pytest.approx(quota, rel=0.005)
    assert kept_on_average(_counts(slots), TOKENS, threshold) == pytest.approx(quota)


def test_the_ends_keep_one_slot_and_all() -> None:
    slots = _slots(0)
    assert _kept(slots, threshold_of_quota(_counts(slots), TOKENS, 1.0)) == 1
    assert threshold_of_quota(_counts(slots), TOKENS, 4.0) == 0.0
    assert kept_on_average(_counts(slots), TOKENS, 0.0) == 4


def test_mean_quotas_spend_every_budget_in_half_slots() -> None:
    losses = np.random.default_rng(0).random((3, 7)).cumsum(axis=1)[:, ::-1]
    mean = solve_mean_quotas(losses, QuotaBounds.uniform(3, 1, 4))
    np.testing.assert_array_equal(mean.quotas.sum(axis=1), np.arange(3, 13))
    assert (mean.quotas * 2 == np.round(mean.quotas * 2)).all()
    assert mean.predicted_loss[-1] == losses[:, -1].sum()


def test_a_pinned_layer_is_pinned_under_thresholds_too() -> None:
    losses = np.random.default_rng(0).random((3, 7)).cumsum(axis=1)[:, ::-1]
    bounds = QuotaBounds(np.array([1, 2, 1]), np.array([4, 2, 4]))
    mean = solve_mean_quotas(losses, bounds)
    assert (mean.quotas[:-1, 1] == 2).all()
    assert len(mean.quotas) == 12 - 4 + 1


def test_thresholds_between_anchors_keep_what_lies_between() -> None:
    # Scores grow as budgets shrink: what is seen depends on the layers before.
    budgets = np.arange(4, 9)
    mean = MeanQuotas(np.stack([budgets / 2, budgets / 2], axis=1), np.zeros(5))
    anchors = [0, 2, 4]
    recorded = []
    for row in anchors:
        counts = np.stack([_counts(_slots(layer, 1 + 0.1 * (4 - row))) for layer in range(2)])
        recorded.append(Scores(counts, np.full(2, TOKENS)))
    thresholds = thresholds_of(mean, anchors, recorded)
    assert (thresholds[-1] == 0).all()
    for row in range(4):
        for layer in range(2):
            slots = _slots(layer, 1 + 0.1 * (4 - row))
            kept = _kept(slots, thresholds[row, layer])
            assert kept == pytest.approx(mean.quotas[row, layer], rel=0.02)
    errors = heldout_errors(thresholds, mean, anchors, recorded)
    np.testing.assert_allclose(errors, 0, atol=1e-6)


def test_anchors_include_the_smallest_and_the_full_budget() -> None:
    assert anchor_rows(36, 13)[0] == 0
    assert anchor_rows(36, 13)[-1] == 35
    assert anchor_rows(3, 13) == [0, 1, 2]
