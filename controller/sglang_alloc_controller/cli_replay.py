"""Control story, afterwards: `sglang-alloc-controller replay LOG...`."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from sglang_alloc.errors import reason_of
from sglang_alloc.shared_table import CalmBudgets
from sglang_alloc_controller.decision_record import BEGINNING
from sglang_alloc_controller.replay import ReplayedTick, ReplayError, replay
from sglang_alloc_controller.samples import PHASES
from sglang_alloc_controller.settings import Settings
from sglang_alloc_controller.tick_report import budgets_of_calm_steps

_SHOWN_DIFFERENCES = 20


def replay_files(logs: list[Path], settings: Settings | None, csv_path: Path | None) -> bool:
    """Replay the logs, print a summary, write the CSV; return whether a budget differs.

    Raises:
        ReplayError: a log cannot be read or replayed, or the CSV cannot be written.
    """
    ticks = list(replay(_records(logs), settings))
    different = [tick for tick in ticks if tick.budgets_differ]
    for tick in different[:_SHOWN_DIFFERENCES]:
        typer.echo(_sentence(tick))
    if len(different) > _SHOWN_DIFFERENCES:
        typer.echo(f"... and {len(different) - _SHOWN_DIFFERENCES} more")
    typer.echo(_summary(ticks, len(different)))
    if csv_path is not None:
        _export(ticks, csv_path)
    return bool(different)


def _records(logs: list[Path]) -> Iterator[dict[str, Any]]:
    for path in logs:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = reason_of(error)
            raise ReplayError(
                f"Cannot read the log {path}: {reason}. Give a file that the controller wrote to "
                "decision_log.path."
            ) from error
        lines = text.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                if _was_cut(text, lines[number:]):
                    typer.echo(f"{path}: left out a line that was cut short", err=True)
                    continue
                raise ReplayError(f"{path} has a line that is no JSON: {line[:80]!r}.") from error
            if not isinstance(record, dict):
                raise ReplayError(f"{path} has a line that is no JSON object: {line[:80]!r}.")
            yield record


def _was_cut(text: str, following: list[str]) -> bool:
    """Tell whether the writer was ended in this line: it is the last one, or another life began."""
    if not following:
        return not text.endswith("\n")
    return f'"kind":"{BEGINNING}"' in following[0]


def _sentence(tick: ReplayedTick) -> str:
    parts = [
        f"{phase} {tick.recorded[phase]} -> {tick.replayed[phase]} "
        f"({tick.recorded_reasons[phase]} -> {tick.replayed_reasons[phase]})"
        for phase in PHASES
        if tick.recorded[phase] != tick.replayed[phase]
    ]
    if tick.recorded_calm != tick.replayed_calm:
        parts.append(f"calm {_calm_words(tick.recorded_calm)} -> {_calm_words(tick.replayed_calm)}")
    return f"{tick.time}  {', '.join(parts)}"


def _calm_words(calm: CalmBudgets | None) -> str:
    if calm is None:
        return "none"
    prefill, decode, running_requests = calm
    return f"{prefill}/{decode} below {running_requests} running"


def _summary(ticks: list[ReplayedTick], differing: int) -> str:
    count = max(1, len(ticks))
    means = ", ".join(
        f"{phase} {sum(tick.recorded[phase] for tick in ticks) / count:.1f} -> "
        f"{sum(tick.replayed[phase] for tick in ticks) / count:.1f}"
        for phase in PHASES
    )
    return f"{differing} of {len(ticks)} ticks differ; mean budget {means} activations per token"


def _export(ticks: list[ReplayedTick], path: Path) -> None:
    columns = ["recorded", "replayed", "recorded_reason", "replayed_reason"]
    calm_columns = ["recorded_calm", "replayed_calm"]
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names = [f"{p}_{column}" for p in PHASES for column in columns]
            names += [f"{p}_{column}" for p in PHASES for column in calm_columns]
            writer.writerow(["time", *names])
            for tick in ticks:
                writer.writerow([tick.time, *_cells(tick)])
    except OSError as error:
        raise ReplayError(f"Cannot write {path}: {error.strerror}.") from error


def _cells(tick: ReplayedTick) -> Iterator[object]:
    for phase in PHASES:
        yield tick.recorded[phase]
        yield tick.replayed[phase]
        yield tick.recorded_reasons[phase]
        yield tick.replayed_reasons[phase]
    for phase in PHASES:
        for budgets, calm in (
            (tick.recorded, tick.recorded_calm),
            (tick.replayed, tick.replayed_calm),
        ):
            yield budgets_of_calm_steps(calm, budgets)[phase]
