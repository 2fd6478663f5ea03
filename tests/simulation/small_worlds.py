"""Plants and workloads whose arithmetic can be done by hand."""

from typing import Any

from sglang_alloc_controller.simulator.plant import Plant
from sglang_alloc_controller.simulator.workload import Workload
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
    arrivals, prompts, outputs = zip(*requests, strict=True)
    return Workload(arrivals, prompts, outputs)
