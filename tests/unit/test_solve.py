"""The dynamic programme against enumeration of every choice."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_alloc.errors import TableFormatError
from sglang_alloc.solve import solve_all_budgets

# Whole numbers add exactly, so ties are real ties.
sensitivities = st.integers(1, 4).flatmap(
    lambda layers: st.integers(1, 4).flatmap(
        lambda top_k: st.lists(
            st.lists(st.integers(-5, 5), min_size=top_k, max_size=top_k),
            min_size=layers,
            max_size=layers,
        )
    )
)


def _all_rows(sensitivity: np.ndarray, min_quota: int) -> list[tuple[float, tuple[int, ...]]]:
    num_layers, top_k = sensitivity.shape
    choices = itertools.product(range(min_quota, top_k + 1), repeat=num_layers)
    return [(sum(sensitivity[i, k - 1] for i, k in enumerate(row)), row) for row in choices]


def _best_row(
    rows: list[tuple[float, tuple[int, ...]]], budget: int
) -> tuple[float, tuple[int, ...]]:
    """Least loss; then most spent; then the largest quotas from the last layer backwards."""
    affordable = [(loss, row) for loss, row in rows if sum(row) <= budget]
    return min(affordable, key=lambda item: (item[0], -sum(item[1]), [-k for k in item[1][::-1]]))


@given(sensitivities, st.integers(1, 2))
def test_every_row_is_the_brute_force_optimum(table: list[list[int]], min_quota: int) -> None:
    sensitivity = np.array(table, dtype=np.float64)
    min_quota = min(min_quota, sensitivity.shape[1])
    solution = solve_all_budgets(sensitivity, min_quota=min_quota)
    rows = _all_rows(sensitivity, min_quota)
    for index, budget in enumerate(solution.budgets[:-1].tolist()):
        loss, row = _best_row(rows, budget)
        assert solution.quotas[index].tolist() == list(row)
        assert solution.predicted_loss[index] == loss


@given(sensitivities)
def test_the_last_row_is_the_full_model(table: list[list[int]]) -> None:
    sensitivity = np.array(table, dtype=np.float64)
    solution = solve_all_budgets(sensitivity)
    num_layers, top_k = sensitivity.shape
    assert solution.budgets.tolist() == list(range(num_layers, num_layers * top_k + 1))
    assert (solution.quotas[-1] == top_k).all()
    assert solution.predicted_loss[-1] == sensitivity[:, -1].sum()


def test_a_layer_that_is_better_with_fewer_experts_leaves_budget_unspent() -> None:
    sensitivity = np.array([[0.0, 3.0, 1.0], [2.0, 1.0, 0.5]])
    solution = solve_all_budgets(sensitivity)
    assert solution.quotas.tolist() == [[1, 1], [1, 2], [1, 3], [1, 3], [3, 3]]
    assert solution.predicted_loss.tolist() == [2.0, 1.0, 0.5, 0.5, 1.5]


def test_equal_losses_keep_as_many_experts_as_the_budget_allows() -> None:
    solution = solve_all_budgets(np.zeros((3, 4)))
    assert solution.quotas.sum(axis=1).tolist() == solution.budgets.tolist()


def test_realistic_losses_agree_with_brute_force_within_rounding() -> None:
    sensitivity = np.random.default_rng(0).normal(size=(5, 4))
    solution = solve_all_budgets(sensitivity)
    rows = _all_rows(sensitivity, 1)
    best = [_best_row(rows, budget)[0] for budget in solution.budgets[:-1].tolist()]
    np.testing.assert_allclose(solution.predicted_loss[:-1], best, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sensitivity_that_is_not_finite_is_named(bad: float) -> None:
    sensitivity = np.ones((2, 3))
    sensitivity[1, 2] = bad
    with pytest.raises(TableFormatError, match="row 1, top-3"):
        solve_all_budgets(sensitivity)


@pytest.mark.parametrize("shape", [(3,), (0, 2), (2, 0), (1, 2, 3)])
def test_a_sensitivity_that_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TableFormatError, match="expected a matrix"):
        solve_all_budgets(np.ones(shape))


@pytest.mark.parametrize("min_quota", [0, 4])
def test_a_smallest_quota_outside_the_top_k_is_refused(min_quota: int) -> None:
    with pytest.raises(TableFormatError, match="min_quota: expected 1 to"):
        solve_all_budgets(np.ones((2, 3)), min_quota=min_quota)
