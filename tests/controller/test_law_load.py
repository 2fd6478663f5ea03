"""What arrives and what a server carries, computed by hand."""

import math
import random
from collections.abc import Iterable

import numpy as np
import pytest
from law_views import make_constants

from sglang_alloc_controller import law_load
from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.law_capacity import (
    Demand,
    Engine,
    Levels,
    choices,
    felt,
    late_price,
    late_share,
    learned_from,
    prior,
    work_of,
    works_of,
)
from sglang_alloc_controller.law_load import (
    Load,
    changed_window,
    load_of,
    trend_nats,
    within_age,
)
from sglang_alloc_controller.load_history import LoadHistory, LoadWindow, PlausibleQueue
from sglang_alloc_controller.samples import Histogram, Phase, Reading

LAW = make_constants().law
RANGES: dict[Phase, BudgetRange] = {
    "prefill": BudgetRange(
        10, 40, (10, 40), (1.024, 2.048), (0.2, 0.0), (100.0, 2048.0), ((0.05, 1.024), (0.1, 2.048))
    ),
    "decode": BudgetRange(
        10, 40, (10, 40), (0.01, 0.02), (0.1, 0.0), (8.0, 16.0), ((0.01, 0.02), (0.02, 0.04))
    ),
}
# 100 prompt tokens of 1 ms, and 10 tokens of 0.04 / 16 s: 0.1 + 0.025 s of work at full.
LOAD = Load(5.0, 0.1, 100.0, 10.0, 100.0, 5.0, 0.0)
BUSY = Engine(16.0, 16.0)


def _window(seconds: float, per_second: float, prompt_tokens: float = 100.0) -> LoadWindow:
    arrivals = seconds * per_second
    return LoadWindow(seconds, arrivals, arrivals, prompt_tokens * arrivals, 10 * arrivals)


def _after(seconds: float, per_second: float, before: LoadWindow) -> LoadWindow:
    """The window that is longer than `before` by so many seconds at this rate."""
    added = _window(seconds, per_second)
    return LoadWindow(*(one + other for one, other in zip(before, added, strict=True)))


def test_a_load_that_stays_is_known_the_better_the_longer_it_is_counted() -> None:
    short, long = (load_of([_window(seconds, 5.0)], None, None) for seconds in (6.0, 100.0))
    assert short is not None
    assert long is not None
    assert short.rate_per_second == long.rate_per_second == 5.0
    assert (short.variance, long.variance) == (pytest.approx(5 / 6), pytest.approx(5 / 100))
    assert (long.prefill_tokens, long.decode_tokens) == (100.0, 10.0)


def test_a_rate_that_rises_steadily_is_told_from_one_that_is_constant() -> None:
    pieces = [(100.0, 6.0), (100.0, 5.5), (200.0, 5.0), (200.0, 4.0)]  # the newest first
    rising, falling, constant = [_window(100.0, 6.0)], [_window(100.0, 4.0)], [_window(100.0, 5.0)]
    for seconds, rate in pieces[1:]:
        rising.append(_after(seconds, rate, rising[-1]))
        falling.append(_after(seconds, 10.0 - rate, falling[-1]))
        constant.append(_after(seconds, 5.0, constant[-1]))
    # Of a mean of 4.92: 108, 58 and -183 requests too many 250, 150 and -200 s from the middle.
    assert trend_nats(rising) == pytest.approx(72500**2 / 1.65e7 / (2 * 4.9167), rel=1e-3)
    assert trend_nats(falling) > 8.0
    assert trend_nats(constant) == pytest.approx(0.0)
    # Clumps of a minute are none, and neither is a load without requests.
    assert trend_nats([_window(20.0, 9.0), _after(40.0, 1.0, _window(20.0, 9.0))]) == 0.0
    assert trend_nats([_window(50.0, 0.0), _window(200.0, 0.0)]) == 0.0


def test_the_window_with_most_evidence_dates_a_change() -> None:
    young = _window(6.0, 12.0)
    windows = [_window(3.0, 12.0), young, _after(6.0, 3.0, young), _after(94.0, 3.0, young)]
    assert changed_window(windows, 100.0, LAW) is young
    # What is known of the load before draws the rate a little.
    load = load_of(within_age(windows, 6.0), 3.0, None)
    assert load is not None
    assert load.rate_per_second == pytest.approx((72 + 3) / 7)


def test_the_rate_of_late_answers_is_that_of_the_last_100_seconds_of_this_load() -> None:
    recent = _window(100.0, 6.0)
    rising = [_window(30.0, 6.5), recent, _after(200.0, 3.0, recent), _after(600.0, 1.0, recent)]
    load = load_of(rising, None, None)
    assert load is not None
    assert (load.rate_per_second, load.recent_per_second) == (pytest.approx(4.0), 6.0)
    # A younger load has no other one in it, and nothing of the rate before it.
    young = load_of(within_age(rising, 30.0), 2.0, None)
    assert young is not None
    assert young.recent_per_second == 6.5


def test_a_steady_load_has_not_changed_and_a_lull_needs_more_evidence_than_a_rush() -> None:
    steady = [_window(seconds, 5.0) for seconds in (3.0, 10.0, 100.0)]
    assert changed_window(steady, 100.0, LAW) is None
    # 10 s at 8 or 2.4 per second instead of 4.6: 9.2 and 7.2 nats, of which 8.1 and 13 are asked.
    rush, lull = _window(10.0, 9.0), _window(10.0, 2.0)
    assert changed_window([rush, _after(240.0, 4.6, rush)], 250.0, LAW) is rush
    assert changed_window([lull, _after(240.0, 4.6, lull)], 250.0, LAW) is None


def test_an_old_load_needs_more_evidence_of_a_change_than_a_young_one() -> None:
    rush = _window(5.0, 9.6)
    windows = [rush, _after(295.0, 4.6, rush)]
    assert changed_window(windows, 30.0, LAW) is rush
    assert changed_window(windows, 3600.0 * 24, LAW) is None


def test_longer_prompts_at_the_same_rate_are_another_load() -> None:
    young = _window(4.0, 3.0, prompt_tokens=400.0)
    windows = [young, _after(96.0, 3.0, young)]
    assert changed_window(windows, 100.0, LAW) is young
    load = load_of(within_age(windows, 4.0), 3.0, LOAD)
    assert load is not None
    assert load.prefill_tokens == 400.0


def test_more_requests_with_shorter_prompts_are_no_other_load() -> None:
    def found(prompt_tokens: float) -> bool:
        young = _window(5.0, 9.8, prompt_tokens)
        return changed_window([young, _after(600.0, 6.0, young)], 605.0, LAW) is not None

    # Neither the rate nor the prompts are evidence enough alone: both have to say more work.
    assert not found(100.0)
    assert found(140.0)
    assert not found(71.0)


def test_the_bound_without_logarithms_passes_over_no_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws = random.Random(5)
    cases = []
    for _ in range(400):
        windows = [_window(4.0, draws.uniform(0.0, 9.0), draws.uniform(60.0, 180.0))]
        for seconds in (6.0, 20.0, 90.0, 300.0):
            added = _window(seconds, draws.uniform(3.0, 5.5), draws.uniform(80.0, 130.0))
            windows.append(LoadWindow(*(map(sum, zip(windows[-1], added, strict=True)))))
        cases.append(windows)

    def found() -> list[LoadWindow | None]:
        return [changed_window(windows, 420.0, LAW) for windows in cases]

    bounded = found()
    monkeypatch.setattr(law_load, "_evidence_bound", lambda window, whole: math.inf)
    assert bounded == found()
    assert 20 < bounded.count(None) < 380


def test_too_few_requests_say_nothing_of_the_sizes() -> None:
    assert load_of([_window(3, 0.5)], None, None) is None
    load = load_of([_window(3, 0.5)], None, LOAD)
    assert load is not None
    assert (load.prefill_tokens, load.rate_per_second) == (100.0, 0.5)


def test_a_queue_that_grows_counts_as_arrivals() -> None:
    history = LoadHistory()
    for second, queue in enumerate((0.0, 0.0, 2.0, 4.0, 6.0, 8.0)):
        counts = Histogram((math.inf,), (5.0 * second,), 0.0)
        history.add(
            Reading(float(second), {"m": counts}, {}, queue, 1.0, prefill_tokens=0.0), queue
        )
    newest = history.windows()[-1]
    assert newest.arrivals == pytest.approx(25.0 + 8.0)
    history.clear()
    assert history.windows() == ()


def _grown(second: float, engines: int) -> Reading:
    """Each engine gets 4 requests a second, of 100 prompt tokens and 10 after the first one."""
    ttft, itl = (
        {str(engine): Histogram((math.inf,), (rate * second,), 0.0) for engine in range(engines)}
        for rate in (4.0, 40.0)
    )
    tokens = 400.0 * second * engines
    return Reading(second, ttft, itl, 0.0, 1.0, prefill_tokens=tokens, engines=engines)


def test_of_engines_read_as_one_the_load_of_each_counts() -> None:
    one, three = LoadHistory(), LoadHistory()
    for second in range(10):
        one.add(_grown(float(second), 1), 0.0)
        three.add(_grown(float(second), 3), 0.0)
    assert three.windows() == one.windows()
    load = load_of(three.windows(), None, None)
    assert load is not None
    assert load.rate_per_second == pytest.approx(4.0)
    assert (load.prefill_tokens, load.decode_tokens) == pytest.approx((100.0, 10.0))


def test_an_absurd_queue_is_not_believed_until_the_next_reading_says_it_again() -> None:
    gauge = PlausibleQueue()

    def taken(first_second: int, *values: float) -> list[float]:
        return [gauge.take(value, float(first_second + i)) for i, value in enumerate(values)]

    assert taken(0, 3.0, 1e6, 4.0, 25.0) == [3.0, 3.0, 4.0, 25.0]
    assert taken(4, 500.0, 510.0, 520.0) == [25.0, 510.0, 520.0]


def _counted(second: float, counts: Histogram, engines: int = 1) -> Reading:
    both = {"engine": counts}
    return Reading(second, both, both, 0.0, 4.0, prefill_tokens=1.0, engines=engines)


def _history(arrivals: Iterable[float], engines: int = 1) -> LoadHistory:
    """A reading every second; so many requests have come in each of the seconds before."""
    history, total = LoadHistory(), 0.0
    for second, came in enumerate([0.0, *arrivals]):
        total += came
        counts = Histogram((1.0, math.inf), (total, total), total)
        history.add(_counted(float(second), counts, engines), 0.0)
    return history


def test_how_evenly_requests_come_is_told_from_pieces_of_ten_seconds() -> None:
    even = _history([5.0] * 300)
    assert even.dispersion() == 0.0
    # 50 and 54 in turn: half of the squared differences over the mean, and two errors.
    turns = ([5.0] * 10 + [5.4] * 10) * 15
    of_turns = 8 / 52 * (1 + 2 * math.sqrt(3 / 30))
    assert _history(turns).dispersion() == pytest.approx(of_turns)
    assert _history(turns, engines=4).dispersion() == pytest.approx(of_turns)
    clumps = _history(([20.0] * 10 + [0.0] * 10) * 15)
    assert clumps.dispersion() == 1.0


@pytest.mark.parametrize(
    "arrivals", [[5.0] * 170, [0.1] * 300, [0.0] * 300], ids=["too short", "too few", "none"]
)
def test_from_little_no_evenness_is_concluded(arrivals: list[float]) -> None:
    assert _history(arrivals).dispersion() == 1.0


def test_a_load_that_rises_steadily_is_not_taken_for_clumps() -> None:
    assert _history([4.0 + second / 150 for second in range(300)]).dispersion() < 0.05


def test_after_a_gap_in_the_readings_only_what_came_since_tells() -> None:
    history = LoadHistory()
    for second in [*range(200), *range(260, 400)]:
        counts = Histogram((1.0, math.inf), (5.0 * second, 5.0 * second), 5.0 * second)
        history.add(_counted(float(second), counts), 0.0)
    assert history.dispersion() == 1.0  # 14 pieces


def test_a_queue_may_have_grown_long_while_nobody_looked() -> None:
    gauge = PlausibleQueue()
    assert [gauge.take(3.0, 0.0), gauge.take(300.0, 60.0), gauge.take(1e6, 61.0)] == [3, 300, 300]


def test_the_work_of_a_request_is_its_prompt_and_its_share_of_decode_steps() -> None:
    found = choices(works_of(LOAD, RANGES, BUSY, LAW), RANGES)
    assert (found.prefill[0], found.decode[0]) == (1, 1)
    assert found.work_seconds[0] == pytest.approx(0.1 + 0.025)
    assert found.losses == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_a_pair_that_loses_more_and_is_no_faster_is_not_worth_taking() -> None:
    # With decode at its floor a step takes as long as at full.
    slow = RANGES["decode"]._replace(step_times=((0.02, 0.04), (0.02, 0.04)))
    ranges = RANGES | {"decode": slow}
    found = choices(works_of(LOAD, ranges, BUSY, LAW), ranges)
    assert list(zip(found.prefill, found.decode, strict=True)) == [(1, 1), (0, 1)]
    assert found.losses == pytest.approx([0.0, 0.2])
    assert found.work_seconds == pytest.approx([0.125, 0.075])


def test_long_prompts_and_few_running_requests_change_what_work_counts() -> None:
    def work_seconds(engine: Engine) -> float:
        works = works_of(LOAD, RANGES, engine, LAW)
        return work_of(Levels(1, 1), works, RANGES).work_seconds

    assert work_seconds(Engine(16.0, 16.0, slack=0.5)) == pytest.approx(2 * 0.125)
    # 1.6 of 16 run, half of the fifth under which they are few: a quarter of decode counts.
    assert work_seconds(Engine(16.0, 1.6)) == pytest.approx(0.1 + 0.025 / 4)
    slower = Engine(16.0, 16.0, slowdown=3.0)
    assert work_seconds(slower) == pytest.approx(3 * (0.1 + 0.025))


def _best(rate: float, **demand: float) -> Levels:
    found = choices(works_of(LOAD, RANGES, BUSY, LAW), RANGES)
    price = late_price(found.work_seconds, Demand(rate, **demand), 0.7, 0.95, LAW)
    best = (found.losses + price).argmin()
    return Levels(int(found.prefill[best]), int(found.decode[best]))


def test_the_smallest_loss_is_kept_while_it_carries_the_load_and_late_answers_have_a_price() -> (
    None
):
    assert _best(4.0) == Levels(1, 1)
    # Utilisation 0.75 at full: 12 % late, worth 0.10 nats; decode at its floor loses 0.1, with 3 %.
    assert _best(6.0) == Levels(1, 1)
    # 0.7875: 22 % late, worth 0.22 nats; with decode at its floor 0.709 and 5.6 %, worth 0.03.
    assert _best(6.3) == Levels(1, 0)
    # 0.7875 even then, and 0.525 with prefill at its floor.
    assert _best(7.0) == Levels(0, 1)
    assert _best(100.0) == Levels(0, 0)


def test_a_rate_in_doubt_and_a_peak_to_come_ask_for_more_speed() -> None:
    assert _best(6.3) == Levels(1, 0)
    assert _best(6.3, variance=2.0) == Levels(0, 1)
    assert _best(4.0, peak_per_second=7.0, peak_weight=0.01) == Levels(1, 1)
    assert _best(4.0, peak_per_second=9.0, peak_weight=0.9) == Levels(0, 1)


def test_requests_that_come_evenly_need_less_speed() -> None:
    assert felt(0.9, 1.0) == pytest.approx(0.9)
    assert felt(0.9, 0.5) == pytest.approx(0.8)
    assert felt(1.0, 0.5) == 1.0
    assert felt(0.9, 0.0) == felt(0.9, 0.3) == pytest.approx(1 - 0.1 / 0.3)
    assert _best(6.3) == Levels(1, 0)
    # Utilisation 0.7875 is felt as 0.29 then.
    assert _best(6.3, dispersion=0.3) == Levels(1, 1)
    assert _best(7.0) == Levels(0, 1)
    assert _best(7.0, dispersion=0.3) == Levels(1, 1)
    assert _best(100.0, dispersion=0.3) == Levels(0, 0)


def test_the_share_of_late_answers_grows_for_ever_and_without_a_jump() -> None:
    odds = [-50.0, -3.0, -1e-9, 1e-9, 0.999, 1.001, 5.0, 100.0]
    shares = [float(late_share(np.array([one]))[0]) for one in odds]
    assert shares == sorted(shares)
    assert shares == pytest.approx(late_share(np.array(odds)))
    assert late_share(np.array([math.log(0.05 / 0.95)])) == pytest.approx(0.05)
    assert max(shares[3] - shares[2], shares[5] - shares[4]) < 1e-3


def test_more_misses_than_expected_lower_the_critical_utilisation_and_fewer_raise_it() -> None:
    def after(missed_ratio: float, utilisation: float = LAW.load_critical_prior) -> float:
        return learned_from(
            prior(LAW),
            utilisation=utilisation,
            requests=50.0,
            missed_ratio=missed_ratio,
            seconds=1.0,
            objective_ratio=0.95,
            law=LAW,
        ).utilisation

    assert after(0.2) < LAW.load_critical_prior < after(0.0)
    assert after(0.05 * 1.05) == pytest.approx(LAW.load_critical_prior)
    # On a server with little to do neither says anything.
    assert after(1.0, utilisation=0.05) == pytest.approx(LAW.load_critical_prior, abs=1e-4)


def test_where_everything_is_late_the_critical_utilisation_is_learned_no_better() -> None:
    def precision(utilisation: float) -> float:
        return learned_from(
            prior(LAW),
            utilisation=utilisation,
            requests=500.0,
            missed_ratio=0.95,
            seconds=1.0,
            objective_ratio=0.95,
            law=LAW,
        ).precision

    assert precision(1.5) < 1.01 * prior(LAW).precision < precision(0.9)
