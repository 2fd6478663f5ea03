"""`sglang-alloc set`: a person's budget comes before the controller's, for a limited time."""

import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from sglang_alloc.cli_status import ExistingPathOption
from sglang_alloc.errors import ConfigurationError

if TYPE_CHECKING:
    from sglang_alloc.shared_table import Override, SharedTable, TableShape

_UNIT_SECONDS = {"h": 3600, "m": 60, "s": 1}
_BUDGET_HELP = (
    "N activations per token over all MoE layers, full, or a share of full such as 0.5x. "
    "Default: what is in force."
)


def set_budget(
    *,
    prefill: Annotated[
        str | None, typer.Option(metavar="N|full|0.5x", help=_BUDGET_HELP, show_default=False)
    ] = None,
    decode: Annotated[
        str | None, typer.Option(metavar="N|full|0.5x", help=_BUDGET_HELP, show_default=False)
    ] = None,
    duration: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="10m",
            help="Time limit in h, m and s, such as 90s, 10m or 1h30m; at most 24h. Required.",
            show_default=False,
        ),
    ] = None,
    actor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Who did this, at most 64 bytes. Default: your user name.",
            show_default=False,
        ),
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="End the override now instead. Default: no.")
    ] = False,
    shared_path: ExistingPathOption = None,
) -> None:
    """Override the controller's budgets by hand until a time limit."""
    # Imported here because help must not wait for numpy.
    from sglang_alloc.actor import checked_actor, user_name
    from sglang_alloc.shared_table import SharedTable
    from sglang_alloc.table_path import find_shared_path

    _require_either(clear, prefill, decode, duration)
    with SharedTable.open(find_shared_path(shared_path)) as table:
        if clear:
            table.clear_override()
            typer.echo(f"Cleared the override of {table.path}")
            return
        name = user_name() if actor is None else checked_actor(actor)
        override = _override(table, prefill, decode, duration or "", name)
        table.set_override(*override[:2], override.deadline_ns, override.actor)
        typer.echo(
            f"Set prefill {override.prefill_budget} and decode {override.decode_budget} of "
            f"{table.shape.budget_max} activations per token for {duration} as {override.actor}"
        )


def parse_duration(text: str) -> int:
    """Return the seconds of a duration such as 90s, 10m or 1h30m, from 1 second to 24 hours.

    Raises:
        ConfigurationError: it is not such a duration.
    """
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    values = parts.groups(default="0") if parts else ("0", "0", "0")
    seconds = sum(
        int(value) * unit for value, unit in zip(values, _UNIT_SECONDS.values(), strict=True)
    )
    if not 1 <= seconds <= 24 * 3600:
        raise ConfigurationError(
            f"The time limit {text!r} is not from 1s to 24h. Write it like 90s, 10m or 1h30m."
        )
    return seconds


def parse_budget(text: str, shape: "TableShape") -> int:
    """Return the budget that `text` asks for: a number, "full", or a share of full like 0.5x.

    Raises:
        ConfigurationError: it is none of these, or the table has no row for it.
    """
    budget = -1
    if text == "full":
        budget = shape.budget_max
    elif re.fullmatch(r"\d+", text, re.ASCII):
        budget = int(text)
    elif re.fullmatch(r"\d*\.?\d+x", text, re.ASCII):
        budget = round(float(text[:-1]) * shape.budget_max)
    if not shape.budget_min <= budget <= shape.budget_max:
        raise ConfigurationError(
            f"The budget {text!r} is not one of this table's, {shape.budget_min} to "
            f"{shape.budget_max} activations per token. Give such a number, full, or a share of "
            "full such as 0.5x."
        )
    return budget


def _require_either(clear: bool, *budget_options: str | None) -> None:
    prefill, decode, duration = budget_options
    if clear and any(budget_options):
        raise ConfigurationError("--clear ends an override; give it without budgets and --for.")
    if not clear and (duration is None or not (prefill or decode)):
        raise ConfigurationError(
            "An override needs --prefill or --decode, and a time limit such as --for 10m. Or end "
            "one with --clear."
        )


def _override(
    table: "SharedTable", prefill: str | None, decode: str | None, duration: str, actor: str
) -> "Override":
    from sglang_alloc.shared_table import Override

    now_ns = time.monotonic_ns()
    in_force = table.override(now_ns) or table.selector()
    return Override(
        parse_budget(prefill, table.shape) if prefill else in_force.prefill_budget,
        parse_budget(decode, table.shape) if decode else in_force.decode_budget,
        0,
        now_ns + parse_duration(duration) * 10**9,
        actor,
    )
