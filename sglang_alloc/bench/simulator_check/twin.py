"""Simulator check, third step: the served trace through the simulator, by its public functions."""

from __future__ import annotations

from pathlib import Path

from sglang_alloc.allocation_mode import PHASES
from sglang_alloc.bench.simulator_check.felt import CONTROLLED, BudgetsFrom, Felt, Run, Served
from sglang_alloc.predicted_loss import predicted_loss
from sglang_alloc.shared_table import SharedTable
from sglang_alloc_controller.bench_csv import read_step_times
from sglang_alloc_controller.quality_bounds import budget_ranges
from sglang_alloc_controller.settings import Settings, parse_settings
from sglang_alloc_controller.simulator.laws import Law, OurLaw, StaticLaw
from sglang_alloc_controller.simulator.plant import Plant
from sglang_alloc_controller.simulator.run_law import run_law
from sglang_alloc_controller.simulator.scenarios import Faults, Scenario
from sglang_alloc_controller.simulator.workload import Workload


def plant_of(served: Served, table: SharedTable, bench_csv: Path) -> Plant:
    """Return the server that was measured, by the bench of the same machine."""
    shape = table.shape
    prefill, decode = (
        tuple(float(one) for one in predicted_loss(table, phase)) for phase in PHASES
    )
    return Plant(
        times=read_step_times(bench_csv),
        budget_min=shape.budget_min,
        budget_max=shape.budget_max,
        prefill_losses=prefill,
        decode_losses=decode,
        max_running_requests=served.max_running_requests,
        chunk_tokens=served.chunk_tokens,
    )


def simulate(served: Served, run: Run, plant: Plant, table: SharedTable) -> Run:
    """Return what the simulator makes of the same arrivals, lengths and budgets or controller."""
    settings = parse_settings({**served.settings, "table": str(table.path)})
    controlled = run.name == CONTROLLED
    law = _our_law(settings, table) if controlled else StaticLaw(_fixed_budgets(run))
    return simulate_law(served, run.name, law, plant, settings)


def simulate_law(served: Served, name: str, law: Law, plant: Plant, settings: Settings) -> Run:
    """Return what one law makes of the trace; the controller polls as its settings say."""
    faults = Faults(poll_seconds=settings.source.poll_seconds)
    seconds = served.phases[-1][2]
    scenario = Scenario(name, seconds, lambda capacities, seed: lambda now: 0.0, 0.0, faults=faults)
    workload = Workload(
        tuple(request.due_second for request in served.requests),
        tuple(request.prompt_tokens for request in served.requests),
        tuple(request.output_tokens for request in served.requests),
    )
    found = run_law(law, scenario, workload, plant, seed=0)
    felt = {one.request: Felt(one.ttft_seconds, one.itl_seconds) for one in found.outcomes}
    return Run(
        name,
        tuple(felt[index] for index in range(len(workload))),
        tuple((second, float(waiting)) for second, waiting in found.queue),
        tuple(BudgetsFrom(change.seconds, *change.budgets) for change in found.changes),
    )


def _our_law(settings: Settings, table: SharedTable) -> Law:
    return OurLaw(settings, budget_ranges(table, settings))


def _fixed_budgets(run: Run) -> tuple[int, int]:
    last = run.budgets[-1]
    return last.prefill_budget, last.decode_budget
