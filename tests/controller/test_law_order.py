"""Which phase goes first, by measured step times and predicted losses, computed by hand."""

from law_views import RANGE, make_constants, make_sample, make_seen, make_state, positions_of

from sglang_alloc_controller.budget_range import BudgetRange, by_speed
from sglang_alloc_controller.control_law import decide
from sglang_alloc_controller.law_order import first_down, restore_order
from sglang_alloc_controller.law_state import Reason
from sglang_alloc_controller.step_times import PhaseTimes

PREFILL = BudgetRange(10, 40, (10, 20, 40), (0.05, 0.08, 0.1), (0.3, 0.1, 0.0))
DECODE = BudgetRange(10, 40, (10, 20, 40), (0.006, 0.008, 0.01), (0.06, 0.02, 0.0))
CONSTANTS = make_constants({"prefill": PREFILL, "decode": DECODE})


def _steps_per_second(steps: float) -> object:
    return make_sample(1.0, independent_events=steps * 30.0)


def test_the_phase_that_saves_more_time_per_loss_goes_down_first() -> None:
    # Both save a fifth of their steps; decode loses a fifth of what prefill loses.
    even = make_seen(100.0, itl=_steps_per_second(50.0))  # 50 steps of 10 ms: half of the time
    assert first_down(make_state(), even, CONSTANTS) == "decode"


def test_a_phase_that_takes_little_of_the_time_saves_little() -> None:
    idle_decode = make_seen(100.0, itl=_steps_per_second(10.0))  # a tenth of the time
    assert first_down(make_state(), idle_decode, CONSTANTS) == "prefill"


def test_a_phase_at_its_floor_has_nothing_to_offer() -> None:
    even = make_seen(100.0, itl=_steps_per_second(50.0))
    assert first_down(make_state(1.0, 0.0), even, CONSTANTS) == "prefill"


def test_what_saves_least_time_per_loss_comes_back_first() -> None:
    even = make_seen(100.0, itl=_steps_per_second(50.0))
    assert restore_order(make_state(0.5, 0.5), even, CONSTANTS) == ["prefill", "decode"]


def test_without_step_times_prefill_goes_first_and_the_lower_phase_comes_back_first() -> None:
    plain = make_constants()
    seen = make_seen(100.0)
    assert first_down(make_state(), seen, plain) == "prefill"
    assert restore_order(make_state(0.6, 0.5), seen, plain) == ["decode", "prefill"]


def test_late_first_tokens_lower_the_phase_that_buys_more() -> None:
    seen = make_seen(100.0, ttft=0.5, itl=_steps_per_second(50.0))
    state, decision = decide(make_state(), seen, CONSTANTS)
    assert positions_of(state) == (1.0, 0.5)
    assert decision.reasons["decode"] is Reason.TTFT_SLO


def test_budgets_that_are_slower_than_a_larger_one_are_left_out() -> None:
    seconds = {40: 1.0, 35: 1.4, 30: 1.2, 25: 1.0, 20: 0.9, 15: 0.8, 10: 0.7}
    bounds = BudgetRange(10, 40)

    budgets = tuple(range(10, 41))
    row = tuple(seconds[budget - budget % 5] for budget in budgets)
    times = PhaseTimes((1.0,), budgets, (row,))
    chosen = by_speed(bounds, times, 1.0, lambda budget: 40.0 - budget, levels_max=4)
    assert chosen.levels == (14, 19, 24, 40)
    assert chosen.seconds == (0.7, 0.8, 0.9, 1.0)
    assert chosen.losses == (26.0, 21.0, 16.0, 0.0)
    assert (chosen.floor, chosen.ceiling) == (14, 40)
    assert [chosen.step_seconds(level, 1.0) for level in range(4)] == [0.7, 0.8, 0.9, 1.0]


def test_a_range_without_a_faster_budget_has_one_level() -> None:
    slower = PhaseTimes((1.0,), (10, 40), ((40.0, 10.0),))
    only = by_speed(BudgetRange(10, 40), slower, 1.0, lambda budget: 0.0, 6)
    assert (only.floor, only.ceiling, tuple(only.levels)) == (40, 40, (40,))
    assert (only.budget(0.0), only.budget(1.0), only.position(40)) == (40, 40, 1.0)


def test_a_level_is_the_smallest_step() -> None:
    assert PREFILL.smallest_step == 0.5
    assert [PREFILL.budget(position) for position in (0.0, 0.3, 0.5, 1.0)] == [10, 20, 20, 40]
    assert [PREFILL.position(budget) for budget in (5, 10, 18, 39, 99)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert RANGE.smallest_step == 0.01
