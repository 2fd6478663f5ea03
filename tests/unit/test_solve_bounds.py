"""Solving under bounds for each layer: against enumeration, and what cannot be met is named."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.solve import solve_all_budgets
from sglang_alloc.solve_bounds import QuotaBounds, parse_bounds

TOP_K = 3


@st.composite
def _problems(draw: st.DrawFn) -> tuple[np.ndarray, QuotaBounds]:
    layers = draw(st.integers(1, 4))
    values = draw(st.lists(st.integers(-4, 4), min_size=layers * TOP_K, max_size=layers * TOP_K))
    ends = [sorted(draw(st.tuples(*[st.integers(1, TOP_K)] * 2))) for _ in range(layers)]
    lower, upper = np.array(ends, dtype=np.intp).T
    return np.array(values, np.float64).reshape(layers, TOP_K), QuotaBounds(lower, upper)


@given(_problems())
def test_every_row_is_the_best_within_the_bounds(problem: tuple[np.ndarray, QuotaBounds]) -> None:
    sensitivity, bounds = problem
    solution = solve_all_budgets(sensitivity, bounds=bounds)
    ranges = [range(low, high + 1) for low, high in zip(*bounds, strict=True)]
    rows = [(sum(sensitivity[i, k - 1] for i, k in enumerate(r)), r)
            for r in itertools.product(*ranges)]  # fmt: skip
    assert solution.budgets[0] == bounds.lower.sum()
    assert solution.budgets[-1] == sensitivity.size
    for index, budget in enumerate(solution.budgets[:-1].tolist()):
        affordable = [row for row in rows if sum(row[1]) <= budget]
        best = min(affordable, key=lambda r: (r[0], -sum(r[1]), [-k for k in r[1][::-1]]))
        assert solution.quotas[index].tolist() == list(best[1])
        assert solution.predicted_loss[index] == best[0]
    assert (solution.quotas[-1] == TOP_K).all()


def test_a_pin_counts_more_than_a_layer_s_bound_and_that_more_than_all_layers() -> None:
    bounds = parse_bounds((3, 5, 9), 8, min_quota=["5=1", "2"], max_quota=["6"], pin=["9=4"])
    assert bounds.lower.tolist() == [2, 1, 4]
    assert bounds.upper.tolist() == [6, 6, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_quota": ["5=7"], "max_quota": ["5=3"]}, "Layer 5 .* at least 7 .* at most 3"),
        ({"pin": ["9=9"]}, "--pin 9=9 asks for a quota of 9; .* 1 to 8"),
        ({"pin": ["4=2"]}, "names layer 4, which is not among the MoE layers 3, 5, 9"),
        ({"pin": ["2"]}, "names no layer"),
        ({"min_quota": ["four"]}, "--min-quota four is not a quota"),
        ({"max_quota": ["2"], "pin": ["3=4"]}, "--pin 3=4 contradicts the bounds of layer 3, 1 to"),
        ({"pin": ["3=4", "3=5"]}, "--pin 3=5 contradicts"),
    ],
)
def test_bounds_that_cannot_be_met_are_named(options: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_bounds((3, 5, 9), 8, **options)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (QuotaBounds(np.array([1]), np.array([3])), "for 1 and 1 layers and the sensitivities"),
        (QuotaBounds(np.array([1, 3]), np.array([3, 2])), "Row 1 may have quotas from 3 to 2"),
        (QuotaBounds(np.array([0, 1]), np.array([3, 3])), "Row 0 may have quotas from 0"),
    ],
)
def test_impossible_bounds_are_refused(bounds: QuotaBounds, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        solve_all_budgets(np.ones((2, 3)), bounds=bounds)
