"""SGLang's /v1/loads: true ages, ranks folded as they hurt, and what counts as no answer."""

from dataclasses import replace

import pytest
from loads_answers import answer, rank
from stand_in_server import StandInServer, serving

from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.reading_history import ReadingHistory
from sglang_alloc_controller.samples import InputState, RankTime, Reading, SourceError
from sglang_alloc_controller.settings import FreshnessSettings, SourceSettings
from sglang_alloc_controller.sglang_loads import (
    PREFILLED,
    decode_step_seconds,
    missing_fields,
    parse_loads,
)
from sglang_alloc_controller.sglang_metrics import SGLangMetrics, with_load

PAGE = "sglang:num_queue_reqs 9\nsglang:num_running_reqs 9\n"
READING = Reading(100.0, {}, {}, 9.0, 9.0)


def _moments(steps: float, seconds: float) -> list[float]:
    return [steps, 2 * steps, 1e6 * seconds, 4 * steps, 2e6 * seconds, 2 * steps]


def _read(server: StandInServer, settings: SourceSettings | None = None) -> Reading:
    chosen = settings or SourceSettings()
    source = SGLangMetrics(chosen.model_copy(update={"url": server.url}), lambda: 100.0)
    try:
        return source.read()
    finally:
        source.close()


def test_queues_take_the_longest_rank_and_throughput_the_sum() -> None:
    load = parse_loads(
        answer(
            rank(0, num_waiting_reqs=3, num_waiting_uncached_tokens=900, token_usage=0.2),
            rank(1, num_running_reqs=7, token_usage=0.9, gen_throughput=30.0),
        )
    )
    assert (load.queue_requests, load.running_requests) == (3, 7)
    assert (load.waiting_tokens, load.token_usage_ratio) == (900, 0.9)
    assert load.tokens_per_second == 42.5


def test_the_age_is_that_of_the_rank_with_work_that_is_furthest_behind() -> None:
    load = parse_loads(answer(rank(0, 0.2), rank(1, 7.5), rank(2, 99.0, num_running_reqs=0)))
    assert load.age_seconds == pytest.approx(7.5)


def test_an_idle_engine_has_no_step_to_be_late_with() -> None:
    assert parse_loads(answer(rank(0, 3600.0, num_running_reqs=0))).age_seconds == 0.0


def test_a_clock_that_jumped_back_makes_no_negative_age() -> None:
    assert parse_loads(answer(rank(0, -50.0))).age_seconds == 0.0


def test_a_clock_that_jumped_forward_makes_one_reading_look_old_and_none_new() -> None:
    """The rank stepped by the old clock, the answer is by the new one; the next step is too."""
    settings = SourceSettings()
    history = ReadingHistory(LawSettings(), FreshnessSettings())
    states = []
    for asked_at, age in ((100.0, 0.1), (101.0, 3600.1), (102.0, 0.2)):
        load = parse_loads(answer(rank(0, age)))
        assert load.age_seconds == pytest.approx(age)
        reading = with_load(replace(READING, taken_at_seconds=asked_at), load, settings)
        assert not history.add(reading, after_failure=False)
        assert history.newest is not None
        states.append((history.newest.taken_at_seconds, history.input_state(asked_at)))
    assert [state for _, state in states] == [InputState.VALID] * 3
    assert [taken_at for taken_at, _ in states] == pytest.approx([99.9, 99.9, 101.8])


def test_a_clock_that_jumped_forward_before_a_hang_leaves_the_input_stale() -> None:
    load = parse_loads(answer(rank(0, 3600.0)))
    history = ReadingHistory(LawSettings(), FreshnessSettings())
    history.add(with_load(READING, load, SourceSettings()), after_failure=False)
    assert history.input_state(READING.taken_at_seconds) is InputState.STALE


def test_the_decode_step_is_that_of_the_slowest_rank_between_two_readings() -> None:
    older = parse_loads(answer(rank(0, decode_moments=_moments(10, 1.0)), rank(1)))
    newer = parse_loads(
        answer(rank(0, decode_moments=_moments(30, 2.0)), rank(1, decode_moments=_moments(10, 0.8)))
    )
    assert decode_step_seconds(older, newer) == pytest.approx(0.08)
    assert decode_step_seconds(newer, newer) is None


def test_the_time_of_prefill_steps_is_told_by_some_releases() -> None:
    told = {"total_prefill_uncached_tokens": 700, "total_prefill_busy_us": 90_000}
    load = parse_loads(
        answer(
            rank(0, decode_moments=_moments(10, 1.0), **told),
            rank(1, decode_moments=_moments(20, 1.5)),
        )
    )
    assert load.rank_times == {
        0: RankTime(10.0, 1.0, requests=20.0, prefill_tokens=700.0, prefill_seconds=0.09),
        1: RankTime(20.0, 1.5, requests=40.0),
    }
    assert with_load(READING, load, SourceSettings()).rank_times == load.rank_times
    with pytest.raises(SourceError, match="finite"):
        parse_loads(answer(rank(0, total_prefill_busy_us=float("nan"))))


def test_a_release_without_decode_moments_has_no_step_time() -> None:
    old = rank()
    del old["decode_moments"]
    load = parse_loads(answer(old))
    assert load.rank_times == {}
    assert missing_fields(answer(old)) == ["decode_moments"]


@pytest.mark.parametrize("name", PREFILLED)
def test_a_prefill_sum_that_a_release_lacks_counts_as_nothing_and_is_named(name: str) -> None:
    older = rank(decode_moments=_moments(10, 1.0), **dict.fromkeys(PREFILLED, 2_000_000))
    del older[name]
    times = parse_loads(answer(older)).rank_times[0]
    told = (0.0, 2.0) if name == PREFILLED[0] else (2_000_000.0, 0.0)
    assert (times.prefill_tokens, times.prefill_seconds) == told
    assert missing_fields(answer(older)) == [name]


def test_decode_moments_of_another_number_are_no_step_times() -> None:
    assert parse_loads(answer(rank(decode_moments=[1.0, 2.0, 3.0]))).rank_times == {}


def test_a_renamed_field_is_named() -> None:
    renamed = rank(num_queued_reqs=1)
    del renamed["num_waiting_reqs"]
    assert missing_fields(answer(rank())) == []
    assert missing_fields(answer(rank(), renamed)) == ["num_waiting_reqs"]
    with pytest.raises(SourceError, match="num_waiting_reqs"):
        parse_loads(answer(renamed))


@pytest.mark.parametrize(
    "text", ["", "<html>", "[]", "{}", answer(), answer(rank(token_usage=float("nan")))]
)
def test_an_answer_that_is_not_sglangs_is_an_error(text: str) -> None:
    with pytest.raises(SourceError, match="/v1/loads"):
        parse_loads(text)


def test_a_reading_is_as_old_as_the_slowest_ranks_last_step() -> None:
    with serving(PAGE) as server:
        server.loads = answer(rank(0, 4.0, num_waiting_reqs=2))
        reading = _read(server)
    assert reading.taken_at_seconds == pytest.approx(96.0)
    assert (reading.queue_requests, reading.running_requests) == (2, 1)


def test_a_server_that_offers_no_loads_is_read_by_its_metrics_alone() -> None:
    with serving(PAGE) as server:
        reading = _read(server)
    assert (reading.taken_at_seconds, reading.queue_requests, reading.load) == (100.0, 9, None)


def test_loads_can_be_switched_off() -> None:
    with serving(PAGE) as server:
        server.loads = "not JSON"
        assert _read(server, SourceSettings(loads=False)).queue_requests == 9
        with pytest.raises(SourceError, match=r"source\.loads to false"):
            _read(server)


def test_chosen_priorities_keep_their_own_queue_because_loads_do_not_tell_them_apart() -> None:
    load = parse_loads(answer(rank(num_waiting_reqs=50)))
    chosen = SourceSettings(priorities=["0"])
    apart = replace(READING, priorities=frozenset({"0", "3"}))
    assert with_load(apart, load, chosen).queue_requests == 9
    assert with_load(READING, load, chosen).queue_requests == 50  # this server has none
    assert with_load(READING, load, SourceSettings()).queue_requests == 50


def test_a_hung_scheduler_behind_a_healthy_http_server_gets_no_newer() -> None:
    first, later = (parse_loads(answer(rank(0, age))) for age in (1.0, 11.0))
    settings = SourceSettings()
    before = with_load(READING, first, settings)
    after = with_load(replace(READING, taken_at_seconds=110.0), later, settings)
    assert after.taken_at_seconds == before.taken_at_seconds
