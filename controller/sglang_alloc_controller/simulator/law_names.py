"""Simulator, sixth step: laws by name, each run on one scenario and one seed. Pure."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from sglang_alloc_controller.simulator.laws import Law, OurLaw, StaticLaw
from sglang_alloc_controller.simulator.oracle import Scored, best_static, oracle
from sglang_alloc_controller.simulator.rival_signals import RivalLaw, StepRule
from sglang_alloc_controller.simulator.rivals import (
    Aimd,
    Gradient,
    PlainPi,
    SmoothedRatio,
    ThresholdSteps,
)
from sglang_alloc_controller.simulator.run_law import run_law
from sglang_alloc_controller.simulator.scenarios import Scenario
from sglang_alloc_controller.simulator.scores import score
from sglang_alloc_controller.simulator.workload import Workload
from sglang_alloc_controller.simulator.world import World

OURS, ORACLE, FULL, FLOOR, BEST_STATIC = "ours", "oracle", "full", "floor", "best-static"
# Ours with the same budgets in calm steps and in busy ones, as all the others have them.
ONE_PAIR = "ours-one-pair"
_RULES: Mapping[str, Callable[[], StepRule]] = {
    "threshold-steps": ThresholdSteps,
    "aimd": Aimd,
    "pi": PlainPi,
    "smoothed-ratio": SmoothedRatio,
    "gradient": Gradient,
}
_Planned = Callable[[World, Scenario, Workload, int], Scored]
# These know the arrivals.
_PLANNED: Mapping[str, _Planned] = {ORACLE: oracle, BEST_STATIC: best_static}


class LawCost(NamedTuple):
    """What a run takes, relative to one run of a law that does nothing."""

    name: str
    relative_cost: float


LAWS: tuple[LawCost, ...] = (
    LawCost(OURS, 4.0),
    LawCost(ONE_PAIR, 4.0),
    LawCost(ORACLE, 20.0),
    LawCost(FULL, 1.0),
    LawCost(FLOOR, 1.0),
    LawCost(BEST_STATIC, 16.0),
    *(LawCost(name, 3.0) for name in _RULES),
)
LAW_NAMES: tuple[str, ...] = tuple(law.name for law in LAWS)
# The laws that ours is to beat: they know no more than it does, but for the best static pair.
RIVALS: tuple[str, ...] = (FULL, FLOOR, BEST_STATIC, *_RULES)


def run_named(law: str, world: World, scenario: Scenario, seed: int) -> Scored:
    """Run a law on the scenario's workload of this seed; KeyError: there is no such law."""
    workload = scenario.workload(world.mix, world.capacities, seed)
    if law in _PLANNED:
        return _PLANNED[law](world, scenario, workload, seed)
    settings = world.settings_for(scenario)
    chosen: Law
    if law == OURS:
        chosen = OurLaw(settings, world.ranges)
    elif law == ONE_PAIR:
        plain = settings.law.model_copy(update={"calm_budgets": False})
        chosen = OurLaw(settings.model_copy(update={"law": plain}), world.ranges)
    elif law in (FULL, FLOOR):
        chosen = StaticLaw(world.ceiling if law == FULL else world.floor)
    else:
        chosen = RivalLaw(_RULES[law](), settings, world.ranges)
    run = run_law(chosen, scenario, workload, world.plant, seed)
    return Scored(run, score(run, world.plant, settings.slo))
