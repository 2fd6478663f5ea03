"""The worker's environment: inert by default, and a sentence for each impossible value."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_alloc.errors import ConfigurationError
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
    assert (settings.request_budgets, settings.protected_priority) == ("any", -3)
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
        ("ROUTING", "ours", "use 'engine' for SGLang's functions, or 'fused'"),
        ("FALLBACK", "none", "use 'full', 'hold', or a budget"),
        ("FALLBACK", "0", "use 'full', 'hold', or a budget"),
    ],
)
def test_an_impossible_value_is_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        _settings(**{variable: value})
    assert f"SGLANG_ALLOC_{variable}={value!r}" in str(error.value)
