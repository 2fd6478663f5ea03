"""Data story, step 0: what the environment tells a worker process about its budget table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from sglang_alloc.allocation_mode import MODES, Mode
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.plugin_entry import TABLE_VARIABLE
from sglang_alloc.priority_floors import (
    PRIORITY_FLOORS_VARIABLE,
    PriorityFloor,
    PriorityFloors,
    parse_floors,
)
from sglang_alloc.request_budget import REQUEST_POLICIES, RequestPolicy
from sglang_alloc.shared_table import Fallback

MODE_VARIABLE = "SGLANG_ALLOC_MODE"
STALE_AFTER_VARIABLE = "SGLANG_ALLOC_STALE_AFTER_SECONDS"
FALLBACK_VARIABLE = "SGLANG_ALLOC_FALLBACK"
STEP_RECORD_VARIABLE = "SGLANG_ALLOC_STEP_RECORD"
REQUEST_BUDGETS_VARIABLE = "SGLANG_ALLOC_REQUEST_BUDGETS"
PROTECTED_PRIORITY_VARIABLE = "SGLANG_ALLOC_PROTECTED_PRIORITY"
CORRECT_DRIFT_VARIABLE = "SGLANG_ALLOC_CORRECT_DRIFT"
ROUTING_VARIABLE = "SGLANG_ALLOC_ROUTING"
PROFILE_VARIABLE = "SGLANG_ALLOC_PROFILE"

Routing = Literal["engine", "fused"]

# Ten controller ticks of one second: long enough for a restart, short against a shift.
DEFAULT_STALE_AFTER_SECONDS = 10.0
FULL_QUALITY = Fallback("full", 0, 0)


@dataclass(frozen=True)
class WorkerSettings:
    """How one SGLang process follows the shared table.

    `mode` None means the best the table supports: `threshold` where it holds thresholds, else
    `layer`. `stale_after_seconds` is the heartbeat age after which `fallback` replaces the
    controller.
    `request_budgets` says whether requests may ask for a budget of their own; `priority_floors`
    what they have at least without asking, from the least urgent to the most urgent ones.
    `step_record` is a folder that receives one (step, generation) log per rank, or None.
    `profile_folder` is set by `sglang-alloc profile` alone: a table of probes may then be used, and
    what they record goes there. `correct_drift` lets thresholds follow what they keep of the
    traffic, which makes a request's output depend, slowly, on earlier ones; all steps then have
    the same budgets, calm or not, so that what is measured belongs to one. `routing` says who
    chooses the experts: SGLang's functions, or on a GPU our kernel that drops slots by the way.
    """

    table_path: Path
    mode: Mode | None = None
    stale_after_seconds: float = DEFAULT_STALE_AFTER_SECONDS
    fallback: Fallback = FULL_QUALITY
    request_budgets: RequestPolicy = "lower"
    priority_floors: PriorityFloors = ()
    step_record: Path | None = None
    profile_folder: Path | None = None
    correct_drift: bool = False
    routing: Routing = "engine"


def settings_from_environment(environment: Mapping[str, str] = os.environ) -> WorkerSettings | None:
    """Return the settings, or None when no table is configured and the plugin stays inert.

    Raises ConfigurationError naming the variable, its value and what it may hold.
    """
    table = environment.get(TABLE_VARIABLE, "").strip()
    if not table:
        return None
    record = environment.get(STEP_RECORD_VARIABLE, "").strip()
    profile = environment.get(PROFILE_VARIABLE, "").strip()
    return WorkerSettings(
        table_path=Path(table),
        mode=_mode(environment.get(MODE_VARIABLE, "").strip()),
        stale_after_seconds=_seconds(environment.get(STALE_AFTER_VARIABLE)),
        fallback=parse_fallback(environment.get(FALLBACK_VARIABLE, "full")),
        request_budgets=_policy(environment.get(REQUEST_BUDGETS_VARIABLE, "").strip()),
        priority_floors=_floors(
            environment.get(PRIORITY_FLOORS_VARIABLE, "").strip(),
            environment.get(PROTECTED_PRIORITY_VARIABLE, "").strip(),
        ),
        step_record=Path(record) if record else None,
        profile_folder=Path(profile) if profile else None,
        correct_drift=_switch(CORRECT_DRIFT_VARIABLE, environment.get(CORRECT_DRIFT_VARIABLE, "")),
        routing=_routing(environment.get(ROUTING_VARIABLE, "").strip()),
    )


def parse_fallback(text: str) -> Fallback:
    """Parse `full`, `hold` or a budget in activations per token."""
    word = text.strip().lower()
    if word == "full":
        return FULL_QUALITY
    if word == "hold":
        return Fallback("hold", 0, 0)
    if word.isdigit() and int(word) > 0:
        return Fallback("budget", int(word), int(word))
    raise ConfigurationError(
        f"{FALLBACK_VARIABLE}={text!r} is not a fallback: use 'full', 'hold', "
        "or a budget in activations per token, for example 26"
    )


def _mode(text: str) -> Mode | None:
    if not text:
        return None
    if text not in MODES:
        raise ConfigurationError(
            f"{MODE_VARIABLE}={text!r} is not a mode of allocation: use one of {', '.join(MODES)}"
        )
    return text


def _policy(text: str) -> RequestPolicy:
    if not text:
        return "lower"
    if text not in REQUEST_POLICIES:
        raise ConfigurationError(
            f"{REQUEST_BUDGETS_VARIABLE}={text!r} does not say what requests may ask for: use one "
            f"of {', '.join(REQUEST_POLICIES)}"
        )
    return cast(RequestPolicy, text)


def _routing(text: str) -> Routing:
    if text not in {"", *get_args(Routing)}:
        raise ConfigurationError(
            f"{ROUTING_VARIABLE}={text!r} does not say who chooses the experts: use 'engine' for "
            "SGLang's functions, or 'fused' for our kernel on a GPU"
        )
    return cast(Routing, text or "engine")


def _floors(text: str, protected: str) -> PriorityFloors:
    """Return the floors that two variables tell, of which one may be set."""
    floors = parse_floors(text)
    if not protected:
        return floors
    protected_floor = PriorityFloor(_priority(protected), None)
    if floors:
        raise ConfigurationError(
            f"{PROTECTED_PRIORITY_VARIABLE}={protected!r} and {PRIORITY_FLOORS_VARIABLE}={text!r} "
            "both say what a priority has at least: unset the first and let the floors end with "
            f"{protected_floor}"
        )
    return (protected_floor,)


def _priority(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigurationError(
            f"{PROTECTED_PRIORITY_VARIABLE}={text!r} is not a priority: give a whole number, as "
            "requests do"
        ) from error


def _switch(variable: str, text: str) -> bool:
    word = text.strip()
    if word not in {"", "0", "1"}:
        raise ConfigurationError(f"{variable}={text!r} is not a switch: use 1 for on, 0 for off")
    return word == "1"


def _seconds(text: str | None) -> float:
    if text is None or not text.strip():
        return DEFAULT_STALE_AFTER_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 < seconds < float("inf"):
        raise ConfigurationError(
            f"{STALE_AFTER_VARIABLE}={text!r} is not a positive number of seconds, for example 10"
        )
    return seconds
