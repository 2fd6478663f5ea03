"""The rule that fits the demo's load and SLOs to a machine."""

import pytest
from demo_runs import make_loop

from sglang_alloc.demo.calibration import faster
from sglang_alloc.demo.load_plan import (
    BURST_OVERLOAD_MIN_RATIO,
    BURST_POSITION_RATIO,
    BURST_SECONDS,
    CALM_UTILISATION_RATIO,
    ITL_EDGES_SECONDS,
    KEPT_SHARE_RATIO,
    RAISED_BURST_RATIO,
    TTFT_EDGES_SECONDS,
    bucket_arguments,
    next_edge,
    overloading_rate,
    plan_load,
)
from sglang_alloc.server_runs.errors import ServerRunError


def test_the_burst_lies_between_the_two_capacities() -> None:
    plan = plan_load(make_loop(3.0), make_loop(6.0), make_loop(7.0), make_loop(9.0))
    calm, burst, after = (phase.requests_per_second for phase in plan.phases)
    assert calm == after == pytest.approx(6.0 * CALM_UTILISATION_RATIO)
    assert burst == pytest.approx(6.0 + 3.0 * BURST_POSITION_RATIO)


def test_a_floor_that_gains_nothing_still_gives_an_overload() -> None:
    plan = plan_load(make_loop(3.0), make_loop(6.0), make_loop(6.0), make_loop(5.5))
    assert plan.phases[1].requests_per_second == pytest.approx(6.0 * BURST_OVERLOAD_MIN_RATIO)


def test_slos_are_bucket_edges_of_the_server() -> None:
    full = make_loop(6.0, ttft=0.371, itl=0.0213)
    plan = plan_load(make_loop(3.0), full, make_loop(7.0), make_loop(9.0))
    flags = bucket_arguments()
    itl_flag = flags.index("--bucket-inter-token-latency")
    assert float(f"{plan.slo.ttft_seconds:g}") in [float(edge) for edge in flags[1:itl_flag]]
    assert float(f"{plan.slo.itl_seconds:g}") in [float(edge) for edge in flags[itl_flag + 1 :]]


def test_an_edge_is_the_first_at_or_above_the_value() -> None:
    assert next_edge(1.0, (0.5, 1.0, 2.0)) == 1.0
    assert next_edge(1.01, (0.5, 1.0, 2.0)) == 2.0


def test_edges_ascend() -> None:
    for edges in (TTFT_EDGES_SECONDS, ITL_EDGES_SECONDS):
        assert list(edges) == sorted(set(edges))


def test_a_machine_too_slow_for_any_edge_is_told_so() -> None:
    with pytest.raises(ServerRunError, match="too slow or too busy"):
        plan_load(make_loop(3.0), make_loop(0.1, ttft=90.0), make_loop(7.0), make_loop(9.0))


def test_of_two_measurements_the_faster_counts() -> None:
    assert faster([make_loop(3.0), make_loop(3.6), make_loop(3.2)]) == make_loop(3.6)


def test_the_burst_outgrows_a_long_slo_too() -> None:
    slow = make_loop(6.0, ttft=2.5)
    plan = plan_load(make_loop(3.0), slow, make_loop(7.0), make_loop(9.0))
    wait_seconds = KEPT_SHARE_RATIO * BURST_SECONDS * (plan.burst_per_second / 6.0 - 1)
    assert wait_seconds == pytest.approx(plan.slo.ttft_seconds) == pytest.approx(10.0)


@pytest.mark.parametrize("served_ratio", [1.0, 0.8])
def test_a_carried_burst_is_raised_beyond_what_was_served_in_it_and_the_calm_is_not(
    served_ratio: float,
) -> None:
    plan = plan_load(make_loop(3.0), make_loop(6.0, ttft=0.8), make_loop(7.0), make_loop(9.0))
    served = served_ratio * plan.burst_per_second
    heavier = plan.raised(0.99, served)
    calm, burst, after = (
        after.requests_per_second / before.requests_per_second
        for before, after in zip(plan.phases, heavier.phases, strict=True)
    )
    assert (calm, after) == (1.0, 1.0)
    overloading = overloading_rate(served, plan.slo) / plan.burst_per_second
    assert burst == pytest.approx(max(overloading, RAISED_BURST_RATIO))
    assert (burst > RAISED_BURST_RATIO) is (served_ratio == 1.0)
    assert heavier.slo == plan.slo
    assert heavier.carried == ((plan.burst_per_second, 0.99),)
    assert heavier.raised(0.8, 1.0).carried == (*heavier.carried, (heavier.burst_per_second, 0.8))
