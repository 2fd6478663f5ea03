"""Control story, afterwards: a recorded decision log through today's law. No clock, no I/O.

Each recorded tick gives its time, its reading and what a person had ordered; the law decides anew
from them. What the engine would have answered to other budgets is not known: replay shows where
decisions differ, and a simulator what would have come of it.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sglang_alloc.errors import AllocError, ConfigurationError
from sglang_alloc.shared_table import CalmBudgets
from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.control_core import ControlCore, Forced
from sglang_alloc_controller.decision_record import BEGINNING, TICK
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
    recorded_calm: CalmBudgets | None = None
    """Of calm steps; None: those of all steps."""
    replayed_calm: CalmBudgets | None = None

    @property
    def budgets_differ(self) -> bool:
        """Whether another budget was decided for a phase, or other ones for calm steps."""
        return self.recorded != self.replayed or self.recorded_calm != self.replayed_calm


def replay(
    records: Iterable[Mapping[str, Any]], settings: Settings | None = None
) -> Iterator[ReplayedTick]:
    """Yield every tick of a log, decided by the recorded settings or by other `settings`.

    The bounds of the budgets are the recorded ones in any case.

    Raises:
        ReplayError: the log does not begin with its settings, lacks the readings, or is garbled.
    """
    core: ControlCore | None = None
    has_readings = False
    for number, record in enumerate(records, 1):
        try:
            kind = record["kind"]
            if kind == BEGINNING:
                core = _begin(core, record, settings)
            elif kind == TICK and core is not None:
                has_readings = has_readings or "reading" in record
                yield _tick(core, record)
        except (KeyError, TypeError, ValueError, ConfigurationError) as error:
            raise ReplayError(
                f"Line {number} of the log cannot be replayed ({error!r}). It was written by "
                "another version, or is no decision log."
            ) from error
    if core is None:
        raise ReplayError(
            "The log does not begin with the settings that replay needs. Give the files oldest "
            "first, written by this version."
        )
    if not has_readings:
        raise ReplayError(
            "The log holds no reading: it was written with decision_log.every_tick: false. Set it "
            "to true to record what replay needs."
        )


def _begin(
    core: ControlCore | None, record: Mapping[str, Any], settings: Settings | None
) -> ControlCore:
    if core is not None and record.get("continued"):
        return core
    chosen = settings or parse_settings(record["settings"])
    ranges: dict[Phase, BudgetRange] = {p: BudgetRange(**record["ranges"][p]) for p in PHASES}
    budgets: dict[Phase, int] = {phase: record["budgets"][phase] for phase in PHASES}
    calm = _calm(record.get("calm"))
    if core is None or record.get("started"):
        return ControlCore(chosen, ranges, budgets, record["now_seconds"], calm)
    core.take_settings(chosen)
    if record["anew"]:
        core.take_over(ranges, budgets, record["now_seconds"], calm)
    return core


def _tick(core: ControlCore, record: Mapping[str, Any]) -> ReplayedTick:
    if "reading" in record:
        reading = reading_from_json(record["reading"])
        core.take_in(reading, after_failure=record["source_failures_total"] > 0)
    decision, budgets = core.order(core.seen(record["now_seconds"]), _forced(record))
    return ReplayedTick(
        record["time"],
        {phase: record["desired"][phase] for phase in PHASES},
        budgets,
        {phase: record["reasons"][phase] for phase in PHASES},
        {phase: decision.reasons[phase].value for phase in PHASES},
        _calm_desired(record),
        core.calm_budgets(decision),
    )


def _calm_desired(record: Mapping[str, Any]) -> CalmBudgets | None:
    """Return the calm budgets that were asked for; controllers that logged none had none."""
    calm = record.get("calm")
    if calm is None or calm["desired"] is None:
        return None
    return _calm({**calm["desired"], "running_requests": calm["running_requests"]})


def _calm(pair: Mapping[str, int] | None) -> CalmBudgets | None:
    if pair is None:
        return None
    return CalmBudgets(pair["prefill"], pair["decode"], pair["running_requests"])


def _forced(record: Mapping[str, Any]) -> Forced:
    """Return what a person had forced at this tick."""
    killed: dict[Phase, int] = {phase: record["desired"][phase] for phase in PHASES}
    override: dict[Phase, int] | None = None
    if record["override"] is not None:
        prefill, decode = record["override"]
        override = {"prefill": prefill, "decode": decode}
    return Forced(killed if record["killed"] else None, override)
