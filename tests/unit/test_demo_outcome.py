"""The numbers of a run, against figures worked out by hand."""

import math

import pytest
from demo_runs import SLO, make_record, make_run, steps_alone

from sglang_alloc.demo.heldout_loss import Level, LevelLoss, loss_increase_error, weighted_loss
from sglang_alloc.demo.outcome import (
    attainment_ratio,
    percentile,
    served_per_second,
    summarise_run,
    within_slo,
)


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 20.0), (75, 30.0), (76, 40.0), (95, 40.0), (1, 10.0)]
)
def test_a_percentile_is_the_smallest_measured_value_that_enough_do_not_exceed(
    percent: float, expected: float
) -> None:
    assert percentile([40.0, 10.0, 30.0, 20.0], percent) == expected


def test_a_percentile_of_nothing_is_nan() -> None:
    assert math.isnan(percentile([], 95))


@pytest.mark.parametrize(
    ("ttft", "gaps", "kept"),
    [
        (1.0, (0.1, 0.1), True),  # both exactly at their SLO
        (1.01, (0.05,), False),
        (0.5, (0.05, 0.16), False),  # mean 0.105
        (0.5, (0.02, 0.16), True),  # one slow token, mean 0.09
        (0.5, (), True),
    ],
)
def test_a_request_keeps_its_slos_by_ttft_and_mean_itl(
    ttft: float, gaps: tuple[float, ...], kept: bool
) -> None:
    assert within_slo(make_record(0, due=3.0, ttft=ttft, gaps=gaps), SLO) is kept


def test_a_failed_request_keeps_no_slo() -> None:
    assert not within_slo(make_record(0, due=0.0, error="HTTP 503"), SLO)
    assert not within_slo(make_record(0, due=0.0, ttft=None, error="timeout"), SLO)


def test_attainment_counts_failed_requests() -> None:
    requests = [make_record(i, due=0.0) for i in range(3)]
    requests.append(make_record(3, due=0.0, ttft=None, error="timeout"))
    assert attainment_ratio(requests, SLO) == 0.75


def test_a_run_is_summarised_in_seconds_ratios_and_tokens() -> None:
    requests = (
        make_record(0, due=1.0, ttft=0.2, gaps=(0.02, 0.04)),
        make_record(1, due=12.0, ttft=2.0, gaps=(0.06, 0.08), phase="burst"),
        make_record(2, due=25.0, ttft=None, phase="calm again", error="HTTP 503: no capacity"),
    )
    run = make_run(
        *requests,
        budgets=((0.0, 40, 40), (11.0, 20, 30)),
        steps=steps_alone(*requests, busy=(20, 30)),
        queue=(0.0, 3.0, 6.0),
    )
    numbers = summarise_run(run, SLO)
    assert numbers["requests"] == 3
    assert numbers["errors"] == 1
    assert numbers["error_examples"] == ["HTTP 503: no capacity"]
    assert numbers["slo_attainment_ratio"] == pytest.approx(1 / 3)
    assert numbers["slo_attainment_ratio_by_phase"] == {
        "calm": 1.0,
        "burst": 0.0,
        "calm again": 0.0,
    }
    assert numbers["ttft_seconds"] == pytest.approx({"p50": 0.2, "p95": 2.0, "p99": 2.0})
    assert numbers["itl_seconds"] == pytest.approx({"p50": 0.04, "p95": 0.08, "p99": 0.08})
    assert numbers["queue_requests"] == {"mean": 3.0, "max": 6.0}
    assert numbers["seconds"] == 30.0
    assert numbers["throughput_tokens_per_second"] == pytest.approx(6 / 30)
    assert numbers["prompt_tokens_per_second"] == pytest.approx(200 / 30)
    assert numbers["mean_prefill_budget"] == 30.0
    assert numbers["mean_decode_budget"] == 35.0
    assert numbers["calm_tokens_ratio"] == {"prefill": 0.5, "decode": 0.5}
    assert numbers["mean_budget_in_busy_steps"] == {"prefill": 20.0, "decode": 30.0}
    assert numbers["mean_budget_in_calm_steps"] == {"prefill": 40.0, "decode": 40.0}
    assert numbers["budget_changes"] == 1


def test_only_what_is_answered_in_full_while_the_burst_lasts_counts_as_served_in_it() -> None:
    run = make_run(
        make_record(0, due=9.0, ttft=2.0, gaps=()),  # done at 11: arrived before, served in it
        make_record(1, due=9.0, ttft=0.9, gaps=()),
        make_record(2, due=12.0, phase="burst"),
        make_record(3, due=19.0, ttft=1.0, gaps=(), phase="burst"),  # done at 20, when it is over
        make_record(4, due=13.0, phase="burst", error="HTTP 503"),
    )
    assert served_per_second(run, "burst") == pytest.approx(0.2)


def test_the_loss_of_a_run_is_the_weighted_mean_of_its_levels() -> None:
    levels = [
        LevelLoss(Level(40, 40, 0.75), (1.0, 2.0)),
        LevelLoss(Level(20, 20, 0.25), (1.4, 2.0)),
    ]
    assert weighted_loss(levels) == pytest.approx(0.75 * 1.5 + 0.25 * 1.7)
    # Increases by window: 0.1 and 0; their standard error is 0.05.
    assert loss_increase_error(levels, levels[0]) == pytest.approx(0.05)
