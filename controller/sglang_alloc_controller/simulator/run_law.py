"""Simulator, fifth step: one law, one scenario, one seed, in simulated time. Seeded."""

import random
from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

from sglang_alloc.shared_table import CalmBudgets
from sglang_alloc_controller.samples import Reading
from sglang_alloc_controller.simulator.below_full import BelowFull
from sglang_alloc_controller.simulator.engine import Engine, Obeyed, Outcome
from sglang_alloc_controller.simulator.laws import Budgets, Law, Order, Scrape
from sglang_alloc_controller.simulator.plant import Plant
from sglang_alloc_controller.simulator.scenarios import Faults, Scenario
from sglang_alloc_controller.simulator.workload import Workload

TICK_SECONDS = 0.5
# What a garbled page may say about the queue.
_WRONG_QUEUE_REQUESTS = 1e6


class Change(NamedTuple):
    """Budgets in force from `seconds` on, and the queue then."""

    seconds: float
    budgets: Budgets
    calm: CalmBudgets | None = None


@dataclass(frozen=True)
class Run:
    """Everything that one run left behind."""

    scenario: Scenario
    workload: Workload
    outcomes: tuple[Outcome, ...]
    changes: tuple[Change, ...]
    """The first is where it began."""
    queue: tuple[tuple[float, int], ...]
    """(seconds, waiting requests), once a second."""
    mean_loss: float
    """Nats per generated token."""
    below_full_seconds: float
    """Time in which somebody was served below full quality."""
    end_seconds: float
    obeyed: tuple[Obeyed, Obeyed] = (Obeyed(), Obeyed())
    """What prefill and decode tokens were computed with, to the end of the scenario."""


def run_law(law: Law, scenario: Scenario, workload: Workload, plant: Plant, seed: int) -> Run:
    """Run to the end of the scenario, then without further arrivals until all is answered."""
    order = Order((plant.budget_max, plant.budget_max))
    engine = Engine(workload, plant, order.budgets)
    scraper = Scraper(scenario.faults, seed)
    changes, queue = [Change(0.0, *order)], []
    restarts, below_full = deque(scenario.restarts), BelowFull(plant.budget_max)
    tick, end_seconds = 0, scenario.seconds
    while tick * TICK_SECONDS < end_seconds:
        now = tick * TICK_SECONDS
        if restarts and now >= restarts[0][0]:
            engine.restart(restarts.popleft()[1])
        engine.slowdown_ratio = scenario.slowdown(now)
        engine.advance(now)
        below_full.add(now, engine, order)
        is_up = engine.now_seconds <= now
        chosen = law.tick(now, scraper.at(now, engine if is_up else None))
        if chosen != order:
            order = chosen
            engine.set_budgets(*order.budgets, order.calm)
            changes.append(Change(now, *order))
        if tick % 2 == 0:
            queue.append((now, engine.waiting_requests))
        tick += 1
    mean_loss = engine.loss_sum / max(1, engine.generated_tokens)
    obeyed = engine.obeyed
    last = engine.clone()
    last.advance(end_seconds)
    below_full.add(end_seconds, last, order)
    while not engine.done:
        engine.advance(engine.now_seconds + 60.0)
    return Run(
        scenario, workload, tuple(engine.outcomes), tuple(changes), tuple(queue), mean_loss,
        below_full.seconds, end_seconds, obeyed,
    )  # fmt: skip


def reading_of(engine: Engine, now_seconds: float) -> Reading:
    """Return what the server's /metrics would say now."""
    return Reading(
        taken_at_seconds=now_seconds,
        ttft={"engine": engine.ttft.histogram()} if engine.ttft.events else {},
        itl={"engine": engine.itl.histogram()} if engine.itl.events else {},
        queue_requests=float(engine.waiting_requests),
        running_requests=float(engine.running_requests),
        prefill_tokens=float(engine.prefilled_tokens),
        rank_times={0: engine.work} if engine.work.steps else {},
    )


class Scraper:
    """Reads the engine as the faults allow it."""

    def __init__(self, faults: Faults, seed: int, first_seconds: float = 0.0) -> None:
        """Read from `first_seconds` on."""
        self._faults = faults
        self._random = random.Random(seed + 1)
        self._next_seconds = first_seconds
        self._underway: deque[tuple[float, Reading]] = deque()
        self._scrape = Scrape(None, 0)

    def at(self, now_seconds: float, engine: Engine | None) -> Scrape:
        """Return what the poller holds now; None: the engine is down."""
        if now_seconds >= self._next_seconds:
            self._next_seconds += self._faults.poll_seconds
            self._read(now_seconds, engine)
        while self._underway and self._underway[0][0] <= now_seconds:
            self._scrape = self._scrape._replace(reading=self._underway.popleft()[1])
        return self._scrape

    def _read(self, now_seconds: float, engine: Engine | None) -> None:
        faults = self._faults
        in_outage = any(start <= now_seconds < end for start, end in faults.outages)
        if engine is None or in_outage or self._random.random() < faults.failing_ratio:
            failures = self._scrape.failures_total + 1
            self._scrape = self._scrape._replace(failures_total=failures)
            return
        reading = reading_of(engine, now_seconds)
        if not faults.tells_steps:
            reading = replace(reading, rank_times={})
        if self._random.random() < faults.wrong_queue_ratio:
            reading = replace(reading, queue_requests=_WRONG_QUEUE_REQUESTS)
        self._underway.append((now_seconds + faults.delay_seconds, reading))
