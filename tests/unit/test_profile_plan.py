"""Which probes are laid out, and what sensitivities their losses give."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.profile_plan import (
    Context,
    default_measured,
    falling_to_zero,
    make_plan,
    sensitivity_of,
)


def test_isolated_probes_reduce_one_layer_each() -> None:
    plan = make_plan(2, 3, "isolated", (1, 2))
    assert plan.rows.tolist() == [[1, 3], [2, 3], [3, 1], [3, 2], [3, 3]]
    assert plan.cells.tolist() == [[0, 1, 4], [2, 3, 4]]


def test_the_paper_s_probes_keep_later_layers_at_one() -> None:
    plan = make_plan(3, 2, "paper", (1, 2))
    rows = [plan.rows[i].tolist() for i in plan.cells.ravel()]
    assert rows == [[1, 1, 1], [2, 1, 1], [2, 1, 1], [2, 2, 1], [2, 2, 1], [2, 2, 2]]
    assert len(plan.rows) == 3 * (2 - 1) + 1


def test_target_probes_keep_the_others_at_the_target() -> None:
    plan = make_plan(2, 4, "target", (1, 2), target=2)
    assert plan.rows.tolist() == [[1, 2], [2, 2], [4, 2], [2, 1], [2, 4], [4, 4]]


@pytest.mark.parametrize("context", ["isolated", "target", "paper"])
def test_additive_losses_are_found_exactly_in_every_context(context: Context) -> None:
    layers, top_k = 3, 4
    truth = np.array([[3.0, 2, 1, 0], [5, 3, 1, 0], [8, 4, 2, 0]])
    plan = make_plan(layers, top_k, context, range(1, 5), target=2)
    losses = np.array([truth[range(layers), row.astype(int) - 1].sum() for row in plan.rows])
    np.testing.assert_allclose(sensitivity_of(plan, losses), truth)


def test_losses_that_fall_by_a_factor_are_interpolated_well() -> None:
    plan = make_plan(1, 8, "isolated", (1, 2, 4, 6))
    losses = np.array([np.exp(-k) if k < 8 else 0.0 for k in plan.rows[:, 0]])
    found = sensitivity_of(plan, losses)[0]
    np.testing.assert_allclose(found[:6], np.exp(-np.arange(1, 7)))
    assert found[7] == 0
    assert 0 < found[6] < found[5]


def test_half_slots_have_a_column_each() -> None:
    plan = make_plan(2, 4, "isolated", default_measured(4, 2))
    assert plan.measured == (1.0, 1.5, 2.0, 4.0)
    assert sensitivity_of(plan, np.zeros(len(plan.rows)), 2).shape == (2, 7)


def test_a_plan_can_be_measured_at_fewer_counts() -> None:
    plan = make_plan(2, 8, "isolated", range(1, 9))
    thin = plan.at_counts((1, 4))
    assert thin.measured == (1, 4, 8)
    assert len(thin.probes) == 2 * 2
    assert thin.full_row == plan.full_row


@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 8])
def test_the_default_counts_include_one_and_all(top_k: int) -> None:
    counts = default_measured(top_k)
    assert (counts[0], counts[-1]) == (1, top_k)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=5))
def test_evening_out_gives_the_nearest_falling_row(values: list[int]) -> None:
    row = np.array([*values, 0.0])
    found = falling_to_zero(row)
    assert (np.diff(found) <= 1e-12).all()
    assert found[-1] == 0
    steps = sorted({np.mean(values[i:j]) for i, j in itertools.combinations(range(6), 2)
                    if values[i:j]} | {0.0})  # fmt: skip
    falling = (c for c in itertools.product(steps, repeat=len(values))
               if list(c) == sorted(c, reverse=True) and c[-1] >= 0)  # fmt: skip
    best = min(sum((a - b) ** 2 for a, b in zip(c, values, strict=True)) for c in falling)
    assert ((found[:-1] - row[:-1]) ** 2).sum() == pytest.approx(best)


@pytest.mark.parametrize(
    ("context", "measured", "target", "message"),
    [
        ("isolated", (0, 2), None, "Kept experts of 0 to 4"),
        ("isolated", (2, 5), None, "keeps 1 to 4"),
        ("target", (1,), None, "give --target-quota"),
        ("target", (1,), 9, "1 to 4: give --target-quota"),
    ],
)
def test_impossible_plans_are_named(
    context: Context, measured: tuple[float, ...], target: float | None, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_plan(2, 4, context, measured, target)
