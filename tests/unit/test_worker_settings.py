"""The worker's environment: inert by default, and a sentence for each impossible value."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.priority_floors import PriorityFloor
from sglang_alloc.shared_table import Fallback
from sglang_alloc.worker_settings import settings_from_environment


def _settings(**environment: str) -> object:
    prefixed = {f"SGLANG_ALLOC_{name}": value for name, value in environment.items()}
    return settings_from_environment({"SGLANG_ALLOC_TABLE": "/t.tbl", **prefixed})


@pytest.mark.parametrize("environment", [{}, {"SGLANG_ALLOC_TABLE": "  "}])
def test_the_plugin_is_inert_without_a_table(environment: dict[str, str]) -> None:
    assert settings_from_environment(environment) is None


def test_every_variable_is_read() -> None:
    settings = settings_from_environment(
        {
            "SGLANG_ALLOC_TABLE": "/dev/shm/x.tbl",
            "SGLANG_ALLOC_MODE": "token",
            "SGLANG_ALLOC_STALE_AFTER_SECONDS": "2.5",
            "SGLANG_ALLOC_FALLBACK": "26",
            "SGLANG_ALLOC_REQUEST_BUDGETS": "any",
            "SGLANG_ALLOC_PROTECTED_PRIORITY": "-3",
            "SGLANG_ALLOC_STEP_RECORD": "/tmp/steps",
            "SGLANG_ALLOC_ROUTING": "fused",
        }
    )
    assert settings is not None
    assert settings.table_path == Path("/dev/shm/x.tbl")
    assert (settings.mode, settings.stale_after_seconds) == ("token", 2.5)
    assert settings.fallback == Fallback("budget", 26, 26)
    assert settings.request_budgets == "any"
    assert settings.priority_floors == (PriorityFloor(-3, None),)
    assert settings.step_record == Path("/tmp/steps")
    assert settings.routing == "fused"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MODE", "fastest", "use one of layer, token, threshold, union"),
        ("STALE_AFTER_SECONDS", "soon", "not a positive number of seconds"),
        ("STALE_AFTER_SECONDS", "-1", "not a positive number of seconds"),
        ("STALE_AFTER_SECONDS", "inf", "not a positive number of seconds"),
        ("STALE_AFTER_SECONDS", "nan", "not a positive number of seconds"),
        ("REQUEST_BUDGETS", "all", "use one of off, lower, any"),
        ("PROTECTED_PRIORITY", "high", "give a whole number"),
        ("PRIORITY_FLOORS", "5", "holds '5', which is no floor"),
        ("PRIORITY_FLOORS", "0:12,", "holds '', which is no floor"),
        ("PRIORITY_FLOORS", "0:12;5:30", "which is no floor: give a priority, a colon"),
        ("PRIORITY_FLOORS", "high:30", "for example 0:12,5:30,10:full"),
        ("PRIORITY_FLOORS", "5:most", "whole number of activations per token or 'full'"),
        ("PRIORITY_FLOORS", "5:7.5", "whole number of activations per token or 'full'"),
        ("PRIORITY_FLOORS", "0:12,5:30,5:full", "names priority 5 twice"),
        ("PRIORITY_FLOORS", "0:12,5:30,3:full", "goes up and down in priority"),
        ("ROUTING", "ours", "use 'engine' for SGLang's functions, or 'fused'"),
        ("FALLBACK", "none", "use 'full', 'hold', or a budget"),
        ("FALLBACK", "0", "use 'full', 'hold', or a budget"),
    ],
)
def test_an_impossible_value_is_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        _settings(**{variable: value})
    assert f"SGLANG_ALLOC_{variable}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "floors"),
    [
        ("", ()),
        ("5:30", (PriorityFloor(5, 30),)),
        (" 0:12, 5 : 30,10:Full ", tuple(map(PriorityFloor, (0, 5, 10), (12, 30, None)))),
        ("3:12,-1:full", (PriorityFloor(3, 12), PriorityFloor(-1, None))),
    ],
)
def test_floors_go_from_the_least_urgent_priority_to_the_most_urgent(
    text: str, floors: tuple[PriorityFloor, ...]
) -> None:
    settings = settings_from_environment(
        {"SGLANG_ALLOC_TABLE": "/t.tbl", "SGLANG_ALLOC_PRIORITY_FLOORS": text}
    )
    assert settings is not None
    assert settings.priority_floors == floors


def test_a_protected_priority_beside_floors_is_refused_and_belongs_among_them() -> None:
    with pytest.raises(ConfigurationError, match="let the floors end with 10:full") as error:
        _settings(PROTECTED_PRIORITY="10", PRIORITY_FLOORS="0:12,5:30")
    assert "SGLANG_ALLOC_PROTECTED_PRIORITY='10'" in str(error.value)
    assert "SGLANG_ALLOC_PRIORITY_FLOORS='0:12,5:30'" in str(error.value)
