"""Several alike servers that one controller reads as one, as from a Prometheus server."""

from statistics import fmean

import pytest

from sglang_alloc_controller.samples import Reading
from sglang_alloc_controller.simulator.deployment import read_deployment
from sglang_alloc_controller.simulator.engine import Engine
from sglang_alloc_controller.simulator.laws import OurLaw, Scrape
from sglang_alloc_controller.simulator.run_law import TICK_SECONDS, reading_of
from sglang_alloc_controller.simulator.scores import within_slo
from sglang_alloc_controller.simulator.workload import Workload, poisson_workload
from sglang_alloc_controller.simulator.world import World

SECONDS = 600.0


@pytest.fixture(scope="module")
def world() -> World:
    return read_deployment().world


def _read_as_one(engines: list[Engine], now: float) -> Reading:
    each = [reading_of(engine, now) for engine in engines]
    return Reading(
        taken_at_seconds=now,
        ttft={str(i): one for i, reading in enumerate(each) for one in reading.ttft.values()},
        itl={str(i): one for i, reading in enumerate(each) for one in reading.itl.values()},
        queue_requests=max(reading.queue_requests for reading in each),
        running_requests=max(reading.running_requests for reading in each),
        prefill_tokens=sum(reading.prefill_tokens or 0.0 for reading in each),
        engines=len(engines),
    )


def _run(world: World, count: int, load: float) -> list[Engine]:
    """Send requests round; all servers follow the same budgets."""
    rate = count * world.capacities.at(load)
    workload = poisson_workload(lambda _: rate, rate, SECONDS, lambda _: world.mix, seed=1)
    shares = [
        Workload(*(column[i::count] for column in (
            workload.arrival_seconds, workload.prompt_tokens, workload.output_tokens
        )))
        for i in range(count)
    ]  # fmt: skip
    engines = [Engine(share, world.plant, world.ceiling) for share in shares]
    law, scrape = OurLaw(world.settings, world.ranges), Scrape(None, 0)
    for tick in range(round(SECONDS / TICK_SECONDS)):
        now = tick * TICK_SECONDS
        for engine in engines:
            engine.advance(now)
        if tick % 2 == 0:
            scrape = Scrape(_read_as_one(engines, now), 0)
        order = law.tick(now, scrape)
        for engine in engines:
            engine.set_budgets(*order.budgets, order.calm)
    for engine in engines:
        while not engine.done:
            engine.advance(engine.now_seconds + 60.0)
    return engines


def _loss(engines: list[Engine]) -> float:
    return sum(one.loss_sum for one in engines) / sum(one.generated_tokens for one in engines)


@pytest.mark.parametrize("count", [2, 4])
def test_a_load_that_each_server_carries_at_full_costs_no_quality(world: World, count: int) -> None:
    engines = _run(world, count, 0.95)
    outcomes = [outcome for engine in engines for outcome in engine.outcomes]
    assert fmean(within_slo(one, world.settings.slo) for one in outcomes) > 0.98
    assert _loss(engines) < 0.002


def test_more_servers_under_the_same_load_each_are_given_no_less_quality(world: World) -> None:
    alone, four = (_run(world, count, 1.4) for count in (1, 4))
    assert _loss(four) < 1.1 * _loss(alone)
