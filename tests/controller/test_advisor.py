"""The advisor's arithmetic on knobs that can be done by hand, and against every pair of budgets."""

from itertools import product

import numpy as np
import pytest

from sglang_alloc_controller.advisor import (
    Knob,
    best_within,
    efficient_steps,
    merged_steps,
)
from sglang_alloc_controller.samples import Phase


def _knob(phase: Phase, *points: tuple[int, float, float]) -> Knob:
    """Points of (budget, seconds, loss), the smallest budget first."""
    budgets, seconds, losses = zip(*points, strict=True)
    return Knob(phase, "layer", budgets, seconds, losses)


DECODE = _knob("decode", (2, 5.0, 0.4), (4, 7.0, 0.1), (6, 8.9, 0.06), (8, 10.0, 0.0))
PREFILL = _knob("prefill", (2, 4.0, 0.3), (4, 5.0, 0.1), (8, 6.0, 0.0))


def test_a_budget_that_a_mixture_of_two_others_beats_is_left_out() -> None:
    assert [step.budget for step in efficient_steps(DECODE)] == [4, 2]


def test_a_budget_that_is_slower_than_a_larger_one_is_left_out() -> None:
    knob = _knob("decode", (4, 7.0, 0.1), (6, 11.0, 0.05), (8, 10.0, 0.0))
    assert [step.budget for step in efficient_steps(knob)] == [4]


def test_a_knob_that_saves_nothing_has_no_steps() -> None:
    assert efficient_steps(_knob("prefill", (4, 6.0, 0.1), (8, 6.0, 0.0))) == []


def test_the_step_that_saves_most_per_nat_comes_first() -> None:
    steps = merged_steps([PREFILL, DECODE])
    assert [(step.phase, step.budget) for step in steps] == [
        ("decode", 4), ("prefill", 4), ("decode", 2), ("prefill", 2),
    ]  # fmt: skip
    assert [step.seconds_per_nat for step in steps] == pytest.approx([30, 10, 2 / 0.3, 5])


def test_nothing_may_be_lost_and_nothing_is_saved() -> None:
    assert best_within([PREFILL, DECODE], 0.0) == (8, 8, 0.0, 0.0)


def test_the_bound_on_the_loss_is_shared_by_the_phases() -> None:
    choice = best_within([PREFILL, DECODE], 0.2)
    assert choice == (4, 4, pytest.approx(4.0), pytest.approx(0.2))


def test_no_pair_of_budgets_saves_more_at_the_same_loss() -> None:
    generator = np.random.default_rng(5)
    for _ in range(30):
        knobs = [_random_knob(generator, "prefill"), _random_knob(generator, "decode")]
        reachable = 0.0
        for step in merged_steps(knobs):
            reachable += step.loss_added
            choice = best_within(knobs, reachable + 1e-12)
            assert choice.seconds_saved == pytest.approx(_most_saved(knobs, reachable + 1e-9))


def _random_knob(generator: np.random.Generator, phase: Phase) -> Knob:
    seconds = np.cumsum(generator.uniform(-0.2, 1.0, 6))
    losses = np.append(np.cumsum(generator.uniform(0.01, 1.0, 5))[::-1], 0.0)
    return Knob(phase, "layer", range(1, 7), seconds.tolist(), losses.tolist())


def _most_saved(knobs: list[Knob], max_loss: float) -> float:
    first, second = knobs
    return max(
        first.seconds[-1] - first.seconds[one] + second.seconds[-1] - second.seconds[other]
        for one, other in product(range(6), repeat=2)
        if first.losses[one] + second.losses[other] <= max_loss
    )
