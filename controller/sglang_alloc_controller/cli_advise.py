"""Control story, before the first step: `sglang-alloc-controller advise BENCH... --tables NPZ`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import typer

from sglang_alloc.allocation_mode import MODES, require_support
from sglang_alloc.budget_tables import BudgetTables, load_budget_tables
from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.advisor import Choice, Knob, RequestShape, best_within
from sglang_alloc_controller.bench_csv import modes_measured, read_step_times
from sglang_alloc_controller.cost_model import make_knob, write_cost_model
from sglang_alloc_controller.step_times import StepTimes


class Asked(NamedTuple):
    """What to advise on."""

    benches: Sequence[Path]
    tables: Path
    output: Path | None
    mode: str | None
    shapes: Sequence[RequestShape]
    """One per batch size."""
    max_loss: float


class _Advice(NamedTuple):
    mode: str
    shape: RequestShape
    full_seconds: float
    prefill: Choice
    decode: Choice
    both: Choice


def advise(asked: Asked) -> None:
    """Print what each knob buys at each batch size; write the cost model of the mode to serve.

    Raises:
        ConfigurationError: the files do not belong together or lack what is asked for.
        TableFormatError: the tables cannot be read.
    """
    tables = load_budget_tables(asked.tables)
    measured = _step_times(asked.benches, tables)
    advice = [
        _advice(tables, mode, times, shape, asked.max_loss)
        for shape in asked.shapes
        for mode, times in measured.items()
    ]
    typer.echo(_heading(asked))
    for line in _table(advice):
        typer.echo(line)
    mode = asked.mode or _best_mode(advice)
    if mode not in measured:
        raise ConfigurationError(
            f"--mode {mode} was asked for, and the benches measured {', '.join(measured)}."
        )
    for shape in asked.shapes:
        typer.echo(_sentence([one for one in advice if one.shape == shape]))
    if asked.output is not None:
        write_cost_model(asked.output, tables, mode, measured[mode])
        typer.echo(f"Cost model of mode {mode} written to {asked.output}.")


def _step_times(benches: Sequence[Path], tables: BudgetTables) -> dict[str, StepTimes]:
    measured: dict[str, StepTimes] = {}
    for path in benches:
        for mode in modes_measured(path):
            if mode not in MODES:
                raise ConfigurationError(
                    f"{path} does not say in its column `mode` what was served ({mode}): one of "
                    f"{', '.join(MODES)}. Make it with `sglang-alloc bench`."
                )
            if mode in measured:
                raise ConfigurationError(
                    f"Mode {mode} stands in two benches, of which {path} is one: pass one of them."
                )
            require_support(mode, lambda name: getattr(tables, name) is not None, tables.model_id)
            measured[mode] = read_step_times(path, mode)
    return measured


def _advice(
    tables: BudgetTables, mode: str, times: StepTimes, shape: RequestShape, max_loss: float
) -> _Advice:
    prefill = make_knob(tables, mode, "prefill", times.prefill, shape)
    decode = make_knob(tables, mode, "decode", times.decode, shape)

    def within(*knobs: Knob) -> Choice:
        return best_within(knobs, max_loss)

    full_seconds = prefill.seconds[-1] + decode.seconds[-1]
    return _Advice(
        mode, shape, full_seconds, within(prefill), within(decode), within(prefill, decode)
    )


def _heading(asked: Asked) -> str:
    shape = asked.shapes[0]
    return (
        f"Engine time of a request of {shape.prompt_tokens} prompt and {shape.output_tokens} "
        f"output tokens, and what is saved of it within a predicted loss of {asked.max_loss:g} "
        "nats per token:\n"
    )


def _table(advice: Sequence[_Advice]) -> list[str]:
    lines = [
        "| running | mode | full ms | prefill alone | decode alone | both | budgets (loss) |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in advice:
        shares = " | ".join(
            f"{choice.seconds_saved / one.full_seconds:.1%}"
            for choice in (one.prefill, one.decode, one.both)
        )
        lines.append(
            f"| {one.shape.running_requests} | {one.mode} | {1000 * one.full_seconds:.1f} | "
            f"{shares} | {one.both.prefill_budget} / {one.both.decode_budget} "
            f"({one.both.loss:.4f}) |"
        )
    return [*lines, ""]


def _sentence(advice: Sequence[_Advice]) -> str:
    best = max(advice, key=_saved_ratio)
    first = "prefill" if best.prefill.seconds_saved > best.decode.seconds_saved else "decode"
    return (
        f"{best.shape.running_requests} running: mode {best.mode} saves most "
        f"({_saved_ratio(best):.1%}); {first} buys most of it."
    )


def _best_mode(advice: Sequence[_Advice]) -> str:
    """Return the mode that saves the largest share on the average of the batch sizes."""
    modes = dict.fromkeys(one.mode for one in advice)
    return max(modes, key=lambda mode: sum(_saved_ratio(one) for one in advice if one.mode == mode))


def _saved_ratio(one: _Advice) -> float:
    return one.both.seconds_saved / one.full_seconds
