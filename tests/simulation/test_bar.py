"""What is promised of our law, on short runs of the shipped plant: it rests, and it is worth it."""

import dataclasses
import gc

import pytest

from sglang_alloc_controller import control_core
from sglang_alloc_controller.control_law import lasts
from sglang_alloc_controller.law_state import Decision, Seen
from sglang_alloc_controller.simulator.deployment import read_deployment
from sglang_alloc_controller.simulator.law_names import FLOOR, FULL, ORACLE, OURS, run_named
from sglang_alloc_controller.simulator.laws import Order, OurLaw, Scrape
from sglang_alloc_controller.simulator.run_law import Run, run_law
from sglang_alloc_controller.simulator.scenarios import Faults, Scenario, named
from sglang_alloc_controller.simulator.world import World

MINUTE = 60.0
CHANGES_PER_HOUR_MAX = 6
# The law finds its budgets in these; the bar counts from then on.
SETTLING_SECONDS = 10 * MINUTE


@pytest.fixture(scope="module")
def world() -> World:
    return read_deployment().world


def _overload(minutes: float) -> Scenario:
    """The load of constant-over: what 40 % of the way from full to the floor can carry."""
    share = 1.4
    return Scenario(
        "overload", minutes * MINUTE, lambda capacities, seed: lambda now: capacities.at(share),
        share,
    )  # fmt: skip


def _step(minutes: float) -> Scenario:
    """The burst of step, from the third minute to the third before the end."""
    seconds = minutes * MINUTE

    def share(now: float) -> float:
        return 1.6 if 3 * MINUTE <= now < seconds - 3 * MINUTE else 0.5

    return Scenario(
        "short step", seconds, lambda capacities, seed: lambda now: capacities.at(share(now)), 1.6
    )


def _changes_after(run: Run, seconds: float) -> int:
    return sum(change.seconds >= seconds for change in run.changes[1:])


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0])
def test_ours_changes_budgets_six_times_an_hour_at_most_under_a_constant_overload(
    world: World, gain: float
) -> None:
    plant_world = world if gain == 1.0 else world.with_gain(gain)
    run, score = run_named(OURS, plant_world, _overload(20), 1)
    counted_hours = (run.end_seconds - SETTLING_SECONDS) / 3600
    assert _changes_after(run, SETTLING_SECONDS) <= CHANGES_PER_HOUR_MAX * counted_hours
    assert len(run.changes) > 1  # it did act
    if gain == 1.0:
        assert score.slo_attainment_ratio >= world.settings.slo.objective_ratio


def test_ours_keeps_far_more_than_full_quality_in_a_burst_at_less_loss_than_the_floor(
    world: World,
) -> None:
    ours, full, floor = (run_named(law, world, _step(16), 1).score for law in (OURS, FULL, FLOOR))
    assert full.mean_predicted_loss == 0
    assert ours.slo_attainment_ratio >= 1.5 * full.slo_attainment_ratio
    assert ours.slo_attainment_ratio >= world.settings.slo.objective_ratio
    assert ours.mean_predicted_loss < floor.mean_predicted_loss / 10


def test_ours_finds_out_that_the_server_has_become_slower_than_its_bench(world: World) -> None:
    """The clock falls to two thirds; what arrives is then more than full quality carries."""
    scenario = dataclasses.replace(
        named("throttled"), seconds=15 * MINUTE, slowdown=lambda now: 1.0 if now < MINUTE else 1.5
    )
    ours, full = (run_named(law, world, scenario, 1).score for law in (OURS, FULL))
    assert full.slo_attainment_ratio < 0.8
    assert ours.slo_attainment_ratio >= world.settings.slo.objective_ratio


@pytest.mark.parametrize("law", [OURS, ORACLE])
def test_a_run_leaves_no_cycles_behind_so_that_workers_need_not_look_for_them(
    world: World, law: str
) -> None:
    gc.collect()
    gc.disable()
    try:
        run_named(law, world, _step(8), 1)
        assert gc.collect() == 0
    finally:
        gc.enable()


class _Noted:
    """Our law, and every decision of it."""

    def __init__(self, world: World, scenario: Scenario) -> None:
        self._law = OurLaw(world.settings_for(scenario), world.ranges)
        self.decisions: list[Decision] = []
        decide = self._law.core.decide

        def noted(seen: Seen) -> Decision:
            self.decisions.append(decide(seen))
            return self.decisions[-1]

        self._law.core.decide = noted  # type: ignore[method-assign]

    def tick(self, now_seconds: float, scrape: Scrape) -> Order:
        return self._law.tick(now_seconds, scrape)


def test_a_decision_that_lasts_is_the_one_that_the_law_would_take_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a burst, with readings that fail and that come late."""
    faults = Faults(failing_ratio=0.05, outages=((400.0, 430.0),), delay_seconds=2.0)
    scenario = dataclasses.replace(_step(15), faults=faults)
    workload = scenario.workload(world.mix, world.capacities, 3)

    def decisions() -> list[Decision]:
        law = _Noted(world, scenario)
        run_law(law, scenario, workload, world.plant, 3)
        return law.decisions

    lasting = decisions()
    calls = list[bool]()
    monkeypatch.setattr(control_core, "lasts", lambda *args: calls.append(lasts(*args)))
    assert lasting == decisions()
    assert 0.3 < sum(calls) / len(calls) < 1.0
    assert len({decision.positions["prefill"] for decision in lasting}) > 2
