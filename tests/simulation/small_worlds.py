"""Plants and workloads whose arithmetic can be done by hand."""

from typing import Any

from sglang_alloc_controller.settings import parse_settings
from sglang_alloc_controller.simulator.deployment import useful_ranges
from sglang_alloc_controller.simulator.plant import Plant
from sglang_alloc_controller.simulator.scenarios import Capacities
from sglang_alloc_controller.simulator.workload import RequestMix, Workload
from sglang_alloc_controller.simulator.world import World
from sglang_alloc_controller.step_times import PhaseTimes, StepTimes

FULL, FLOOR = 10, 5


def make_times() -> StepTimes:
    """A prompt token takes 1 ms and a decode step 10 ms at full; half of both at the floor."""
    prefill = PhaseTimes((100.0, 200.0), (FLOOR, FULL), ((0.05, 0.1), (0.1, 0.2)))
    decode = PhaseTimes((1.0, 2.0), (FLOOR, FULL), ((0.005, 0.01), (0.005, 0.01)))
    return StepTimes(prefill, decode, "made by hand")


def make_plant(**fields: Any) -> Plant:
    """A plant of six budgets; prefill loses 1 nat at the floor, decode 2, both evenly."""
    required = {
        "times": make_times(),
        "budget_min": FLOOR,
        "budget_max": FULL,
        "prefill_losses": (1.0, 0.8, 0.6, 0.4, 0.2, 0.0),
        "decode_losses": (2.0, 1.6, 1.2, 0.8, 0.4, 0.0),
        "max_running_requests": 4,
        "chunk_tokens": 200,
    }
    return Plant(**(required | fields))


def make_workload(*requests: tuple[float, int, int]) -> Workload:
    """Requests of (arrival second, prompt tokens, output tokens)."""
    arrivals, prompts, outputs = zip(*requests, strict=True) if requests else ((), (), ())
    return Workload(arrivals, prompts, outputs)


def make_small_world(**plant: Any) -> World:
    """That plant with prompts of 100 tokens and answers of 5; 0.5 s and 0.1 s are promised.

    It would answer 9 requests a second at full quality if they came one after the other.
    """
    slo = {"ttft_seconds": 0.5, "itl_seconds": 0.1}
    settings = parse_settings({"table": "made by hand", "slo": slo})
    made = make_plant(**plant)
    ranges = useful_ranges(made, settings)
    return World(made, RequestMix(100, 5), settings, ranges, Capacities(full=4.0, floor=8.0))
