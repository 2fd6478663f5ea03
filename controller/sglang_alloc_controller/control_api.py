"""Control story, by hand: the orders that a person gives by HTTP."""

from collections.abc import Callable, Mapping
from typing import Any

import structlog

from sglang_alloc.actor import checked_actor, user_name
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.shared_table import OVERRIDE_MAX_NS, SharedTable
from sglang_alloc_controller.config_follower import ReloadOutcome
from sglang_alloc_controller.kill_switch import KillSwitch
from sglang_alloc_controller.metrics_server import Answer, Order

_NANOSECONDS = 1_000_000_000
_RELOAD_TIMEOUT_SECONDS = 5.0
_log = structlog.get_logger("sglang_alloc_controller")


def orders(
    kill_switch: KillSwitch,
    table: Callable[[], SharedTable],
    reload_config: Callable[[float], ReloadOutcome],
    clock_ns: Callable[[], int],
) -> dict[str, Order]:
    """Return the orders by path; `clock_ns` is monotonic."""
    return {
        "/killswitch": lambda content: _kill(kill_switch, content),
        "/override": lambda content: _override(kill_switch, table(), content, clock_ns()),
        "/reload": lambda content: _reload(reload_config, content),
    }


def _kill(kill_switch: KillSwitch, content: Mapping[str, Any]) -> Answer:
    _refuse_unknown(content, {"on", "actor"})
    on, actor = content.get("on"), _actor(content)
    if not isinstance(on, bool):
        raise ConfigurationError('Say {"on": true} or {"on": false}.')
    _log.warning("kill_switch_ordered", on=on, actor=actor)
    if on:
        kill_switch.engage(actor)
    else:
        kill_switch.release()
    return Answer.of_json(200, {"ok": True, "cause": kill_switch.cause()})


def _override(
    kill_switch: KillSwitch, table: SharedTable, content: Mapping[str, Any], now_ns: int
) -> Answer:
    _refuse_unknown(content, {"prefill", "decode", "seconds", "actor", "clear"})
    actor = _actor(content)
    if content.get("clear") is True:
        _log.warning("override_cleared", actor=actor)
        table.clear_override()
        return Answer.of_json(200, {"ok": True, "override": None})
    cause = kill_switch.cause()
    if cause is not None:
        # It would be in force until the next tick, and then ended without a word to its actor.
        raise ConfigurationError(f"The kill switch is on ({cause}). Release it first.")
    in_force = table.override(now_ns) or table.selector()
    prefill = _whole(content, "prefill", in_force.prefill_budget)
    decode = _whole(content, "decode", in_force.decode_budget)
    deadline_ns = now_ns + _seconds(content) * _NANOSECONDS
    table.set_override(prefill, decode, deadline_ns, actor)
    order = {"prefill": prefill, "decode": decode, "seconds": content["seconds"], "actor": actor}
    _log.warning("override_set", **order)
    return Answer.of_json(200, {"ok": True, "override": order})


def _reload(reload_config: Callable[[float], ReloadOutcome], content: Mapping[str, Any]) -> Answer:
    _refuse_unknown(content, {"actor"})
    _log.info("reload_ordered", actor=_actor(content))
    outcome = reload_config(_RELOAD_TIMEOUT_SECONDS)
    status = 200 if outcome.applied else 409
    key = "outcome" if outcome.applied else "problem"
    return Answer.of_json(status, {"ok": outcome.applied, key: outcome.sentence})


def _refuse_unknown(content: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(content) - known)
    if unknown:
        raise ConfigurationError(f"{', '.join(unknown)} is not known; say {sorted(known)}.")


def _actor(content: Mapping[str, Any]) -> str:
    if "actor" not in content:
        return f"http by {user_name()}"
    return checked_actor(content["actor"])


def _whole(content: Mapping[str, Any], key: str, default: int) -> int:
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"{key} is {value!r}; give a whole number of activations.")
    return value


def _seconds(content: Mapping[str, Any]) -> int:
    seconds = content.get("seconds")
    longest = OVERRIDE_MAX_NS // _NANOSECONDS
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not 1 <= seconds <= longest:
        raise ConfigurationError(
            f"seconds is {seconds!r}; an override needs a time limit of 1 to {longest} seconds."
        )
    return seconds
