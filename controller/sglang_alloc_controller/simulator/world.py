"""Simulator, third step: plant, SLOs, request rates and settings that fit together. Pure."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.histogram_window import quantile_seconds
from sglang_alloc_controller.samples import Phase
from sglang_alloc_controller.settings import Settings, parse_settings
from sglang_alloc_controller.simulator.engine import Engine
from sglang_alloc_controller.simulator.laws import Budgets
from sglang_alloc_controller.simulator.plant import Plant
from sglang_alloc_controller.simulator.scenarios import Capacities, Scenario
from sglang_alloc_controller.simulator.scores import within_slo
from sglang_alloc_controller.simulator.workload import RequestMix, Workload, poisson_workload

# An SLO is the next bucket edge above this multiple of what a server at the rim of saturation gives
# without a queue; it leaves room for chance, and the queueing knee lies below it.
_TTFT_SLACK, _ITL_SLACK = 2.5, 1.25
_TRIAL_SECONDS, _BISECTIONS = 900.0, 9
_BACKLOG_REQUESTS = 600


@dataclass(frozen=True)
class World:
    """A plant with its request mix, its promise and the rates it can carry."""

    plant: Plant
    mix: RequestMix
    settings: Settings
    ranges: Mapping[Phase, BudgetRange]
    capacities: Capacities

    @property
    def ceiling(self) -> Budgets:
        """The largest budgets that the settings allow."""
        return self.ranges["prefill"].ceiling, self.ranges["decode"].ceiling

    @property
    def floor(self) -> Budgets:
        """The smallest budgets that the settings allow."""
        return self.ranges["prefill"].floor, self.ranges["decode"].floor

    def settings_for(self, scenario: Scenario) -> Settings:
        """Return the settings with what the scenario's operator has changed."""
        content = self.settings.model_dump()
        for section, values in scenario.settings.items():
            content[section] = {**content[section], **values}
        return parse_settings(content, scenario.name)

    def with_gain(self, gain: float) -> "World":
        """Return the same promises on a plant on which the budget changes times `gain` as much."""
        plant = self.plant.with_gain(gain)
        capacities = find_capacities(plant, self.mix, self.settings, self.ceiling, self.floor)
        return replace(self, plant=plant, capacities=capacities)


def fitting_settings(plant: Plant, mix: RequestMix, content: Mapping[str, Any]) -> Settings:
    """Return settings whose SLOs the plant can keep at full budget under a moderate load.

    `content` holds what else is to be set; a `slo` in it wins over what was found.

    Raises:
        ConfigurationError: first tokens or those after them take too long for any SLO even under a
            moderate load.
    """
    rate = 0.7 * saturation_rate(plant, mix)
    engine = _trial(plant, mix, rate, (plant.budget_max, plant.budget_max))
    ttft = _TTFT_SLACK * median(one.ttft_seconds for one in engine.outcomes)
    if ttft > plant.ttft_edges[-2]:
        sizes = ", ".join(f"{size:g}" for size in plant.times.prefill.sizes)
        raise ConfigurationError(
            f"By the step times of {plant.times.source} first tokens take {ttft:.0f} s at 0.7 of "
            f"what a saturated server answers, so that no SLO fits. Prefill was timed at {sizes} "
            f"tokens, and prompts have {mix.prompt_tokens}: see that the times are milliseconds, "
            "and time prefill at sizes about that of your prompts."
        )
    gaps = engine.itl.histogram()
    itl = _ITL_SLACK * (quantile_seconds(gaps, 0.95) or 0.0)
    if itl > plant.itl_edges[-2]:
        raise ConfigurationError(
            f"By the step times of {plant.times.source} tokens come {itl:.1f} s apart at 0.7 of "
            "what a saturated server answers, so that no SLO fits. See that the times are "
            "milliseconds, or simulate shorter prompts: tokens wait for the prefill of others."
        )
    slo = {
        "ttft_seconds": _next_edge(ttft, plant.ttft_edges),
        "itl_seconds": _next_edge(itl, plant.itl_edges),
    }
    return parse_settings({**content, "slo": {**slo, **content.get("slo", {})}})


def saturation_rate(plant: Plant, mix: RequestMix) -> float:
    """Return the requests per second of a server at full budget that always has some waiting."""
    count = _BACKLOG_REQUESTS
    workload = Workload(
        (0.0,) * count, (mix.prompt_tokens,) * count, (mix.output_tokens,) * count
    )  # fmt: skip
    engine = Engine(workload, plant, (plant.budget_max, plant.budget_max))
    while not engine.done:
        engine.advance(engine.now_seconds + 1.0)
    finished = sorted(one.finished_seconds for one in engine.outcomes)
    middle = finished[count // 6 : -count // 6]
    return (len(middle) - 1) / (middle[-1] - middle[0])


def find_capacities(
    plant: Plant, mix: RequestMix, settings: Settings, ceiling: Budgets, floor: Budgets
) -> Capacities:
    """Return the largest Poisson rates that keep the objective at the ceiling and at the floor."""
    return Capacities(
        slo_capacity(plant, mix, settings, ceiling), slo_capacity(plant, mix, settings, floor)
    )


def slo_capacity(plant: Plant, mix: RequestMix, settings: Settings, budgets: Budgets) -> float:
    """Return the largest Poisson rate that keeps the objective at fixed budgets, by bisection."""
    low, high = 0.0, 4.0 * saturation_rate(plant, mix)
    for _ in range(_BISECTIONS):
        rate = (low + high) / 2
        outcomes = _trial(plant, mix, rate, budgets).outcomes
        kept = fmean(within_slo(one, settings.slo) for one in outcomes)
        low, high = (rate, high) if kept >= settings.slo.objective_ratio else (low, rate)
    return low


def _trial(plant: Plant, mix: RequestMix, rate: float, budgets: Budgets) -> Engine:
    workload = poisson_workload(lambda _: rate, rate, _TRIAL_SECONDS, lambda _: mix, seed=0)
    engine = Engine(workload, plant, budgets)
    while not engine.done:
        engine.advance(engine.now_seconds + 60.0)
    return engine


def _next_edge(seconds: float, edges: Sequence[float]) -> float:
    return edges[bisect_left(edges, seconds)]
