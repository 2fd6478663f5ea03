"""`sglang-alloc set`: a manual budget with a limit, an actor and bounds."""

import getpass
import os
import pwd
import time

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sglang_alloc.cli import app
from sglang_alloc.cli_set import parse_budget, parse_duration
from sglang_alloc.errors import AllocError, ConfigurationError, SharedTableError
from sglang_alloc.shared_table import Override, SelectorWriter, SharedTable, TableShape

SHAPE = TableShape(3, 4, 8, 3, 12)


def _set(table: SharedTable, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["set", "--shared-path", str(table.path), *arguments])


def _override(table: SharedTable) -> Override:
    override = table.override(time.monotonic_ns())
    assert override is not None
    return override


def test_a_manual_budget_is_in_force_for_the_time_given(table: SharedTable) -> None:
    result = _set(table, "--prefill", "full", "--decode", "0.5x", "--for", "10m", "--actor", "ana")
    assert result.exit_code == 0
    assert "prefill 12 and decode 6 of 12 activations per token for 10m as ana" in result.stdout
    override = _override(table)
    assert (override.prefill_budget, override.decode_budget, override.actor) == (12, 6, "ana")
    assert 590e9 < override.deadline_ns - time.monotonic_ns() <= 600e9


def test_the_actor_is_the_user_unless_named(table: SharedTable) -> None:
    _set(table, "--decode", "5", "--for", "1h")
    assert _override(table).actor == getpass.getuser()


def test_a_user_without_a_name_is_named_by_number(
    table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    _set(table, "--decode", "5", "--for", "1h")
    assert _override(table).actor == f"uid {os.getuid()}"


def test_a_phase_that_is_left_out_keeps_what_is_in_force(table: SharedTable) -> None:
    with SelectorWriter.acquire(table) as writer:
        writer.write(8, 9)
    _set(table, "--decode", "5", "--for", "1h")
    assert _override(table)[:2] == (8, 5)
    _set(table, "--prefill", "4", "--for", "1h")
    assert _override(table)[:2] == (4, 5)


def test_clearing_ends_the_override(table: SharedTable) -> None:
    _set(table, "--decode", "5", "--for", "1h")
    result = _set(table, "--clear")
    assert result.stdout == f"Cleared the override of {table.path}\n"
    assert table.override(time.monotonic_ns()) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs --prefill or --decode"),
        (("--decode", "5"), "a time limit such as --for 10m"),
        (("--for", "10m"), "needs --prefill or --decode"),
        (("--clear", "--decode", "5"), "without budgets and --for"),
        (("--decode", "13", "--for", "10m"), "3 to 12 activations per token"),
        (("--decode", "5", "--for", "25h"), "not from 1s to 24h"),
        (("--decode", "5", "--for", "1h", "--actor", "ä" * 33), "has 66 bytes"),
        (("--decode", "5", "--for", "1h", "--actor", ""), "has 0 bytes"),
    ],
)
def test_what_cannot_be_set_is_refused_and_nothing_changes(
    table: SharedTable, arguments: tuple[str, ...], message: str
) -> None:
    result = _set(table, *arguments)
    assert isinstance(result.exception, AllocError)
    assert message in str(result.exception)
    assert table.override(time.monotonic_ns()) is None


def test_a_missing_table_is_named(table: SharedTable) -> None:
    table.path.unlink()
    result = _set(table, "--clear")
    assert isinstance(result.exception, SharedTableError)
    assert str(table.path) in str(result.exception)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1h1m1s", 3661), ("24h", 86400)],
)
def test_durations_are_hours_minutes_and_seconds(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "0s", "-5m", "1d", "5m1h", "24h1s", "1.5h"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="not from 1s to 24h"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "budget"), [("full", 12), ("3", 3), ("12", 12), ("0.5x", 6), (".25x", 3), ("1x", 12)]
)
def test_budgets_are_numbers_full_or_shares_of_full(text: str, budget: int) -> None:
    assert parse_budget(text, SHAPE) == budget


@pytest.mark.parametrize("text", ["", "2", "13", "-5", "0.1x", "1.1x", "x", "half", "1e1"])
def test_other_budgets_are_refused_with_the_range(text: str) -> None:
    with pytest.raises(ConfigurationError, match="3 to 12"):
        parse_budget(text, SHAPE)
