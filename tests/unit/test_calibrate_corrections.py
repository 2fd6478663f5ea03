"""Which k2 is taken, and how gains go from anchors to all budgets."""

import numpy as np
import pytest

from sglang_alloc.calibrate_corrections import (
    gains_of_rows,
    is_surely_lower,
    references_of_rows,
    search_reference,
)

WINDOWS = 16
NOISE = np.random.default_rng(0).normal(scale=0.3, size=WINDOWS)  # of the text, in every loss


class Losses:
    """Losses of windows by k2, and which were measured."""

    def __init__(self, by_k2: dict[int, float], jitter: float = 0.0) -> None:
        self.by_k2, self.jitter = by_k2, jitter
        self.asked: list[int] = []

    def __call__(self, k2: int) -> np.ndarray:
        self.asked.append(k2)
        own = np.random.default_rng(k2).normal(scale=self.jitter, size=WINDOWS)
        return self.by_k2[k2] + NOISE + own - own.mean()


def test_the_k2_of_least_loss_is_found_and_the_search_ends_behind_it() -> None:
    losses = Losses({8: 1.0, 7: 0.98, 6: 0.95, 5: 0.97, 4: 0.9})
    assert search_reference(8, losses) == 6
    assert losses.asked == [8, 7, 6, 5]


def test_a_k2_that_is_better_by_less_than_its_error_is_not_taken() -> None:
    losses = Losses({8: 1.0, 7: 0.999, 6: 1.2, 5: 1.0, 4: 1.0}, jitter=0.1)
    assert search_reference(8, losses) == 8


def test_the_search_goes_down_to_half_of_top_k() -> None:
    losses = Losses({k: float(k) for k in range(1, 9)})
    assert search_reference(8, losses) == 4
    assert search_reference(2, Losses({2: 2.0, 1: 1.0})) == 1
    assert search_reference(1, Losses({1: 1.0})) == 1


def test_windows_are_compared_one_by_one() -> None:
    assert is_surely_lower(NOISE - 0.001, NOISE)
    assert not is_surely_lower(NOISE, NOISE)


def test_a_row_takes_the_nearest_anchor_s_k2_and_the_full_budget_none() -> None:
    assert references_of_rows(8, [0, 4], [5, 7], 8) == [5, 5, 5, 7, 7, 7, 7, 8]


def test_gains_go_with_the_quota_between_two_anchors() -> None:
    quotas = np.array([[1.0, 2.0], [1.0, 3.0], [2.0, 3.0], [2.0, 4.0], [4.0, 4.0]])
    gains = np.array([[1.4, 1.2], [1.2, 1.1], [1.0, 1.0]])
    found = gains_of_rows(quotas, [0, 2, 4], gains)
    np.testing.assert_allclose(found[[0, 2]], gains[:2])
    np.testing.assert_allclose(found[1], [1.4, 1.1])  # quotas of the first and the second anchor
    np.testing.assert_allclose(found[3], [1.2, 1.0])
    np.testing.assert_allclose(found[4], 1.0)


def test_gains_go_with_the_budget_where_a_quota_stays() -> None:
    quotas = np.array([[2.0], [2.0], [2.0], [4.0]])
    found = gains_of_rows(quotas, [0, 2, 3], np.array([[1.4], [1.2], [1.0]]))
    assert found[:, 0].tolist() == pytest.approx([1.4, 1.3, 1.2, 1.0])
