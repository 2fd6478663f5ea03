"""Control story, afterwards: a recorded decision log through today's law. No clock, no I/O.

Each recorded tick gives its time, its reading and what a person had ordered; the law decides anew
from them. What the engine would have answered to other budgets is not known: replay shows where
decisions differ, and a simulator what would have come of it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang_alloc.errors import AllocError, ConfigurationError
from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.control_core import ControlCore
from sglang_alloc_controller.decision_record import BEGINNING, TICK
from sglang_alloc_controller.law_state import Decision, Reason, Seen
from sglang_alloc_controller.reading_json import reading_from_json
from sglang_alloc_controller.samples import PHASES, Phase
from sglang_alloc_controller.settings import Settings, parse_settings


class ReplayError(AllocError):
    """The log cannot be replayed."""


class ReplayedTick(NamedTuple):
    """One tick as it was and as today's law decides it; budgets in activations per token."""

    time: str
    recorded: dict[Phase, int]
    replayed: dict[Phase, int]
    recorded_reasons: dict[Phase, str]
    replayed_reasons: dict[Phase, str]

    @property
    def budgets_differ(self) -> bool:
        """Whether another budget was decided for a phase."""
        return self.recorded != self.replayed


@dataclass
class _Run:
    """What a replay carries from line to line."""

    settings: Settings
    core: ControlCore


def replay(
    records: Iterable[Mapping[str, Any]], settings: Settings | None = None
) -> Iterator[ReplayedTick]:
    """Yield every tick of a log, decided by the recorded settings or by other `settings`.

    The bounds of the budgets are the recorded ones in any case.

    Raises:
        ReplayError: the log does not begin with its settings, lacks the readings, or is garbled.
    """
    run: _Run | None = None
    for number, record in enumerate(records, 1):
        try:
            kind = record["kind"]
            if kind == BEGINNING:
                run = _begin(run, record, settings)
            elif kind == TICK and run is not None:
                yield _tick(run, record)
        except (KeyError, TypeError, ValueError, ConfigurationError) as error:
            raise ReplayError(
                f"Line {number} of the log cannot be replayed ({error!r}). It was written by "
                "another version, or is no decision log."
            ) from error
    if run is None:
        raise ReplayError(
            "The log does not begin with the settings that replay needs. Give the files oldest "
            "first, written by this version."
        )
    if run.core.history.newest is None:
        raise ReplayError(
            "The log holds no reading: it was written with decision_log.every_tick: false. Set it "
            "to true to record what replay needs."
        )


def _begin(run: _Run | None, record: Mapping[str, Any], settings: Settings | None) -> _Run:
    if run is not None and record.get("continued"):
        return run
    chosen = settings or parse_settings(record["settings"])
    ranges: dict[Phase, BudgetRange] = {p: BudgetRange(**record["ranges"][p]) for p in PHASES}
    budgets: dict[Phase, int] = {phase: record["budgets"][phase] for phase in PHASES}
    if run is None:
        return _Run(chosen, ControlCore(chosen, ranges, budgets, record["now_seconds"]))
    run.settings = chosen
    run.core.take_settings(chosen)
    if record["anew"]:
        run.core.take_over(ranges, budgets, record["now_seconds"])
    return run


def _tick(run: _Run, record: Mapping[str, Any]) -> ReplayedTick:
    if "reading" in record:
        reading = reading_from_json(record["reading"])
        run.core.take_in(reading, after_failure=record["source_failures_total"] > 0)
    decision, budgets = _decide(run, record, run.core.seen(record["now_seconds"]))
    return ReplayedTick(
        record["time"],
        {phase: record["desired"][phase] for phase in PHASES},
        budgets,
        {phase: record["reasons"][phase] for phase in PHASES},
        {phase: decision.reasons[phase].value for phase in PHASES},
    )


def _decide(run: _Run, record: Mapping[str, Any], seen: Seen) -> tuple[Decision, dict[Phase, int]]:
    """Return what the loop would have decided, and the budgets that it would have asked for."""
    core = run.core
    if record["killed"]:
        full: dict[Phase, int] = {phase: record["desired"][phase] for phase in PHASES}
        return core.start_over(Reason.KILL_SWITCH, full, seen), full
    fixed = _fixed(run.settings)
    if record["override"] is not None:
        prefill, decode = record["override"]
        in_force: dict[Phase, int] = {"prefill": prefill, "decode": decode}
        decision = core.stand_still(Reason.OVERRIDE, in_force, seen)
        return decision, fixed or core.budgets(decision)
    if fixed is not None:
        return core.stand_still(Reason.FIXED, fixed, seen), fixed
    decision = core.decide(seen)
    return decision, core.budgets(decision)


def _fixed(settings: Settings) -> dict[Phase, int] | None:
    if settings.mode != "fixed" or settings.fixed is None:
        return None
    return {"prefill": settings.fixed.prefill_budget, "decode": settings.fixed.decode_budget}
