"""Control story, before the first step: step times and predicted losses of the mode to be served.

A cost model is a CSV that lies next to the budget tables and that `quality.cost_model` names. Its
rows are those of a bench, of one mode, with what the tables predict beside them:

    phase, concurrency, budget, median_ms, prefill_prompt_tokens   as a bench has them
    mode                       the mode that the file is for
    predicted_loss             nats per output token above full quality
    ms_saved_per_millinat      of the step down that leads to this budget, at this size
    worth_using                1: a corner of the hull; 0: a mixture of two others buys more

A prefill row counts its prompt tokens in `concurrency`, of one token each.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sglang_alloc.atomic_file import replace_file
from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.predicted_loss import loss_section
from sglang_alloc_controller.advisor import Knob, RequestShape, efficient_steps
from sglang_alloc_controller.samples import PHASES, Phase
from sglang_alloc_controller.step_times import PhaseTimes, StepTimes

COST_COLUMNS = (
    "phase", "concurrency", "budget", "median_ms", "prefill_prompt_tokens", "mode",
    "predicted_loss", "ms_saved_per_millinat", "worth_using",
)  # fmt: skip


def make_knob(
    tables: BudgetTables, mode: str, phase: Phase, times: PhaseTimes, shape: RequestShape
) -> Knob:
    """Return every budget from the smallest measured one up, with a request's engine time and loss.

    Raises:
        ConfigurationError: the bench is not of the model of the tables.
    """
    if phase == "prefill":
        steps, size = shape.prompt_tokens / shape.chunk_tokens, float(shape.chunk_tokens)
    else:
        steps = shape.output_tokens / shape.running_requests
        size = float(shape.running_requests)
    budgets = range(times.budgets[0], times.budgets[-1] + 1)
    return _knob(tables, mode, phase, budgets, lambda budget: steps * times.at(size, budget))


def write_cost_model(path: Path, tables: BudgetTables, mode: str, times: StepTimes) -> None:
    """Write the cost model of one mode in one step.

    Raises:
        ConfigurationError: as `make_knob`, or the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COST_COLUMNS)
    writer.writeheader()
    for phase in PHASES:
        of_phase = times.prefill if phase == "prefill" else times.decode
        for size, seconds in zip(of_phase.sizes, of_phase.seconds, strict=True):
            at = dict(zip(of_phase.budgets, seconds, strict=True))
            knob = _knob(tables, mode, phase, of_phase.budgets, at.__getitem__)
            writer.writerows(_rows(knob, size))
    try:
        replace_file(path, text.getvalue().encode(), mode=0o644)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot write the cost model to {path}: {error.strerror}. Choose a folder that this "
            "user can write to and that has room."
        ) from error


def _rows(knob: Knob, size: float) -> Iterator[dict[str, object]]:
    steps = {step.budget: step for step in efficient_steps(knob)}
    full = knob.budgets[-1]
    for budget, seconds, loss in zip(knob.budgets, knob.seconds, knob.losses, strict=True):
        step = steps.get(budget)
        yield {
            "phase": knob.phase,
            "concurrency": round(size),
            "budget": budget,
            "median_ms": f"{1000 * seconds:.4f}",
            "prefill_prompt_tokens": 1,
            "mode": knob.mode,
            "predicted_loss": f"{loss:.6f}",
            "ms_saved_per_millinat": f"{step.seconds_per_nat:.4f}" if step else "",
            "worth_using": int(step is not None or budget == full),
        }


def _knob(
    tables: BudgetTables,
    mode: str,
    phase: Phase,
    budgets: Sequence[int],
    seconds_at: Callable[[int], float],
) -> Knob:
    if budgets[-1] != tables.budget_max or budgets[0] < tables.budget_min:
        raise ConfigurationError(
            f"The bench times {phase} budgets from {budgets[0]} to {budgets[-1]}, and the tables "
            f"of {tables.model_id} have rows from {tables.budget_min} to {tables.budget_max}. Pass "
            "the tables that were served in the bench."
        )
    name = loss_section(mode, phase, lambda one: getattr(tables, one) is not None)
    losses = getattr(tables, name)
    return Knob(
        phase,
        mode,
        budgets,
        tuple(seconds_at(budget) for budget in budgets),
        tuple(float(losses[budget - tables.budget_min]) for budget in budgets),
    )
