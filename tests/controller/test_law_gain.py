"""What a server's own step times say of its bench, and what the law makes of it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from ahead import looking_ahead, run
from law_views import make_constants, make_seen, make_state, positions_of
from virtual_loop import publish_table

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.control_law import decide
from sglang_alloc_controller.law_capacity import Levels, with_gain
from sglang_alloc_controller.law_forward import first_belief
from sglang_alloc_controller.law_gain import Gain, seen_steps, slowdown_of
from sglang_alloc_controller.law_load import Load
from sglang_alloc_controller.law_state import Evidence, ForwardState, initial_state
from sglang_alloc_controller.law_steps import with_step_times
from sglang_alloc_controller.load_history import LoadWindow
from sglang_alloc_controller.reading_history import Newest, ReadingHistory
from sglang_alloc_controller.samples import Histogram, Phase, RankTime, Reading

# By the bench the floor saves 30 % of a decode step and 40 % of a prefill step.
RANGES: dict[Phase, BudgetRange] = {
    "prefill": BudgetRange(
        10, 40, (10, 40), (0.6, 1.0), (0.1, 0.0), (100.0, 2048.0), ((0.06, 1.2), (0.1, 2.0))
    ),
    "decode": BudgetRange(
        10, 40, (10, 40), (0.014, 0.02), (0.01, 0.0), (8.0, 16.0), ((0.014, 0.028), (0.02, 0.04))
    ),
}
CONSTANTS = make_constants(RANGES)
LOAD = Load(5.0, 0.1, 100.0, 10.0, 100.0, 5.0, 0.0)


def _learned(points: list[tuple[float, float]], before: Gain | None = None) -> Gain:
    gain = before or Gain()
    for ratio, bench_ratio in points:
        gain = seen_steps(gain, ratio, bench_ratio, error=0.05, seconds=1.0, memory_seconds=1800.0)
    return gain


def test_before_anything_is_seen_the_bench_is_right() -> None:
    assert Gain().line() == (1.0, 0.0)
    assert Gain().factor() == 1.0
    assert with_gain([0.7, 1.0], 1.0) == [0.7, 1.0]
    assert with_gain([0.2, 0.7, 1.0], 2.0) == pytest.approx([0.05, 0.4, 1.0])


@pytest.mark.parametrize("truth", [0.6, 1.0, 1.5, 1.9])
@pytest.mark.parametrize("slowdown", [0.9, 1.0, 1.2])
def test_a_slower_server_is_told_from_one_whose_budgets_save_more(
    truth: float, slowdown: float
) -> None:
    full, floor = slowdown, slowdown * (1 - 0.3 * truth)
    gain = _learned([(full, 1.0)] * 60 + [(floor, 0.7)] * 60)
    assert gain.line()[0] == pytest.approx(slowdown, abs=0.02)
    assert gain.factor() == pytest.approx(truth, abs=0.08)


def test_at_full_nothing_is_learned_of_the_gain() -> None:
    gain = _learned([(1.3, 1.0)] * 500)
    assert gain.line()[0] == pytest.approx(1.3, abs=0.01)
    assert gain.factor() == pytest.approx(1.0)


def test_one_odd_reading_is_no_other_server_and_the_gain_has_bounds() -> None:
    steady = [(1.0, 1.0)] * 30 + [(0.7, 0.7)] * 30
    assert _learned([*steady, (9.0, 0.7)]).factor() == pytest.approx(1.0, abs=0.1)
    assert _learned([(0.2, 0.7)] * 200).factor() == 2.0
    assert _learned([(1.5, 0.7)] * 200).factor() == 0.5


@pytest.mark.parametrize(
    ("ratio", "believed"),
    [
        (1.0, 1.0), (1.14, 1.0), (0.88, 1.0),
        (1.2, (1.2 / 1.15) ** 2), (1.5, 1.5), (3.0, 3.0), (20.0, 8.0),
        (0.8, (0.8 * 1.15) ** 2), (0.6, 0.6), (0.1, 0.25),
    ],
)  # fmt: skip
def test_steps_that_take_longer_as_a_whole_count_beyond_a_band(
    ratio: float, believed: float
) -> None:
    assert slowdown_of(_learned([(ratio, 1.0)] * 300)) == pytest.approx(believed, rel=0.01)


def test_only_what_slows_both_phases_is_a_slower_server() -> None:
    """A prefill step that waits for a decode step, or decode at long contexts, are none."""
    as_benched, slow, fast = (_learned([(ratio, 1.0)] * 300) for ratio in (1.0, 2.0, 0.5))
    slower, faster = _learned([(1.5, 1.0)] * 300), _learned([(0.7, 1.0)] * 300)
    for phases in ((slow, as_benched), (as_benched, slow), (slow, fast), (fast, as_benched)):
        assert slowdown_of(*phases) == 1.0
    assert slowdown_of(slow, slower) == slowdown_of(slower, slow) == pytest.approx(1.5, abs=0.01)
    assert slowdown_of(fast, faster) == slowdown_of(faster, fast) == pytest.approx(0.7, abs=0.01)


def test_a_server_that_is_another_is_believed_within_a_dozen_readings_and_its_gain_stays() -> None:
    before = _learned([(1.0, 1.0)] * 600 + [(0.55, 0.7)] * 600)
    assert before.factor() == pytest.approx(1.5, abs=0.05)
    after = _learned([(1.1, 0.7)] * 10, before)
    assert slowdown_of(after) == 1.0
    after = _learned([(1.1, 0.7)] * 5, after)
    assert slowdown_of(after) == pytest.approx(2.0, abs=0.05)
    assert after.factor() == pytest.approx(1.5, abs=0.1)
    assert slowdown_of(_learned([(0.55, 0.7)] * 15, after)) == 1.0


def test_odd_readings_on_both_sides_are_no_other_server() -> None:
    steady = _learned([(1.0, 1.0)] * 60)
    assert slowdown_of(_learned([(9.0, 1.0), *[(1.0, 1.0)] * 9] * 10, steady)) == 1.0
    assert slowdown_of(_learned([(1.5, 1.0), (0.5, 1.0)] * 50, steady)) == 1.0


def test_doubt_of_the_slowdown_moves_neither_it_nor_the_gain() -> None:
    gain = _learned([(1.2, 1.0)] * 60 + [(0.6, 0.7)] * 60)
    doubted = gain.of_another_server()
    assert doubted.line() == pytest.approx(gain.line())
    # Its variance is the one before, and 1 more.
    variances = [one.i_dd / (one.i_ss * one.i_dd - one.i_sd**2) for one in (gain, doubted)]
    assert variances[1] - variances[0] == pytest.approx(1.0)


def _by_the_minute(gain: Gain, ratio: float, bench_ratio: float) -> Gain:
    """What is known two hours later."""
    for _ in range(120):
        gain = seen_steps(gain, ratio, bench_ratio, error=0.05, seconds=60.0, memory_seconds=1800.0)
    return gain


def test_what_was_learned_at_full_lasts_while_the_budget_is_lower() -> None:
    gain = _by_the_minute(_learned([(1.2, 1.0)] * 60), 0.66, 0.7)
    assert gain.line()[0] == pytest.approx(1.2, abs=0.02)
    assert gain.factor() == pytest.approx(1.5, abs=0.05)


def test_a_server_that_became_slower_is_learned_anew() -> None:
    gain = _by_the_minute(_learned([(1.0, 1.0)] * 60 + [(0.7, 0.7)] * 60), 1.2, 1.0)
    assert gain.line()[0] == pytest.approx(1.2, abs=0.01)
    assert _by_the_minute(gain, 0.84, 0.7).factor() == pytest.approx(1.0, abs=0.1)


def _after_reading(work: RankTime, now_seconds: float = 10.0) -> ForwardState:
    """The belief after a second with this work at the floor, where the budgets are since 5 s."""
    state = initial_state({"prefill": 0.0, "decode": 0.0}, CONSTANTS.law, 5.0)
    seen = make_seen(now_seconds)._replace(newest=Newest(1.0, 5.0, 0.0, work))
    belief = first_belief(CONSTANTS)._replace(load=LOAD)
    return with_step_times(belief, (Levels(0, 0), Levels(0, 0)), state, seen, CONSTANTS)


def test_decode_steps_count_at_their_mean_batch_and_prefill_steps_at_their_tokens() -> None:
    # 20 steps of 12 requests at 0.012 s, where the bench has 0.021 of 0.03 s.
    decoded = RankTime(steps=20.0, seconds=20 * 0.012, requests=240.0)
    belief = _after_reading(decoded)
    assert belief.decode_gain.factor() > 1.1
    assert belief.prefill_gain == Gain()
    # 110 tokens are a step of 1.1 prompts: 0.064 of 0.107 s by the bench, as slow as full here.
    belief = _after_reading(RankTime(prefill_tokens=550.0, prefill_seconds=0.53))
    assert belief.prefill_gain.factor() < 0.9
    assert belief.decode_gain == Gain()


def test_steps_at_other_levels_too_few_and_none_teach_nothing() -> None:
    work = RankTime(20.0, 0.24, 240.0, 550.0, 0.53)
    first = first_belief(CONSTANTS)._replace(load=LOAD)
    assert _after_reading(work, now_seconds=6.5) == first  # began before the change and dead time
    assert _after_reading(RankTime(4.0, 0.1, 48.0)) == first
    assert _after_reading(RankTime()) == first


def test_a_server_that_saves_more_than_its_bench_is_given_up_less() -> None:
    # 3.7 requests a second are 0.35 of full by prompts and 0.05 by tokens; twice that is too much.
    arrivals = 7.4 * 100.0
    windows = (LoadWindow(100.0, arrivals, arrivals, 100 * arrivals, 10 * arrivals),)
    seen = make_seen(200.0)._replace(load_windows=windows, running_requests=16.0)
    lower, _ = decide(make_state(), seen, CONSTANTS)
    assert min(positions_of(lower)) < 1
    saves_more = _learned([(1.0, 1.0)] * 60 + [(0.4, 0.7)] * 60)
    assert lower.forward is not None
    knows = replace(
        make_state(),
        forward=first_belief(CONSTANTS)._replace(prefill_gain=saves_more, decode_gain=saves_more),
    )
    less, _ = decide(knows, seen, CONSTANTS)
    assert sum(positions_of(less)) >= sum(positions_of(lower))


def test_a_server_that_is_slower_than_its_bench_gives_up_more() -> None:
    # 0.35 of full by prompts and 0.05 by tokens, and twice that once all steps take twice as long.
    arrivals = 3.7 * 100.0
    windows = (LoadWindow(100.0, arrivals, arrivals, 100 * arrivals, 10 * arrivals),)
    seen = make_seen(200.0)._replace(load_windows=windows, running_requests=16.0)
    as_benched, _ = decide(make_state(), seen, CONSTANTS)
    assert positions_of(as_benched) == (1, 1)
    slower = _learned([(2.0, 1.0)] * 60)
    knows = replace(
        make_state(),
        forward=first_belief(CONSTANTS)._replace(prefill_gain=slower, decode_gain=slower),
    )
    lower, _ = decide(knows, seen, CONSTANTS)
    assert min(positions_of(lower)) < 1


def test_what_was_learned_of_step_times_is_shown(tmp_path: Path) -> None:
    publish_table(tmp_path / "t.tbl")
    controller, engine = looking_ahead(tmp_path / "t.tbl")
    engine.queue_requests = 0.0
    told = controller.source
    seconds = 0

    def reading() -> Reading:
        nonlocal seconds
        seconds += 1
        # 10 steps of 16 requests a second, which by the bench take 36 ms each at full.
        done = RankTime(10.0 * seconds, 10.0 * seconds * 0.072, 160.0 * seconds)
        return replace(told(), rank_times={0: done})

    controller.source = reading
    controller.tick()
    assert math.isnan(controller.metric("step_time_ratio", phase="decode"))
    run(controller, 40)
    assert controller.metric("step_time_ratio", phase="decode") == pytest.approx(2.0, abs=0.05)
    assert math.isnan(controller.metric("step_time_ratio", phase="prefill"))  # none was told


def test_the_work_between_two_readings_is_that_of_all_ranks() -> None:
    law, freshness = CONSTANTS.law, CONSTANTS.freshness

    def work(*of_readings: dict[int, RankTime]) -> RankTime:
        history = ReadingHistory(law, freshness)
        for second, rank_times in enumerate(of_readings):
            counts = Histogram((1.0, math.inf), (5.0 * second, 5.0 * second), 0.0)
            reading = Reading(float(second), {"m": counts}, {}, 0.0, 1.0, rank_times=rank_times)
            history.add(reading, after_failure=False)
        newest = history.between_last_two(CONSTANTS.slo)
        assert newest is not None
        return newest.work

    before = {0: RankTime(10.0, 1.0, 20.0, 300.0, 0.2), 1: RankTime(5.0, 1.0, 5.0)}
    after = {0: RankTime(12.0, 1.5, 26.0, 350.0, 0.3), 1: RankTime(6.0, 1.25, 7.0)}
    assert work(before, after) == pytest.approx(RankTime(3.0, 0.75, 8.0, 50.0, 0.1))
    assert work({}, after) == work(after, {}) == RankTime()


def _busy_second(belief: ForwardState, now_seconds: float, slowdown: float) -> ForwardState:
    """The belief after a second of steps at full that take so many times the bench's."""
    state = initial_state({"prefill": 1.0, "decode": 1.0}, CONSTANTS.law, 5.0)
    # 0.03 s for a decode step of 12, and 0.107 s for a prefill step of 110 tokens.
    work = RankTime(10.0, 10 * 0.03 * slowdown, 120.0, 440.0, 4 * 0.107 * slowdown)
    seen = make_seen(now_seconds)._replace(newest=Newest(1.0, 5.0, 0.0, work))
    full = Levels(1, 1)
    return with_step_times(belief, (full, full), state, seen, CONSTANTS)


def test_a_server_that_has_become_another_begins_a_new_wait_and_ends_old_evidence() -> None:
    late = Evidence(90.0, 0.4, 5.0, 1.0, 1.0)
    belief = first_belief(CONSTANTS)._replace(load=LOAD, pending=(late,))
    for second in range(60):
        belief = _busy_second(belief, 100.0 + second, 1.0)
    assert (belief.server_since_seconds, belief.pending) == (-math.inf, (late,))
    for second in range(60):
        belief = _busy_second(belief, 160.0 + second, 1.5)
    assert 165.0 <= belief.server_since_seconds <= 175.0
    assert belief.pending == ()
    for second in range(60):
        belief = _busy_second(belief, 220.0 + second, 1.0)
    assert 225.0 <= belief.server_since_seconds <= 235.0
