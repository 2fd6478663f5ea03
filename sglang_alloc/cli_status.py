"""`sglang-alloc status`: the budget asked for, the budget in force and what it does, live."""

import sys
from pathlib import Path
from typing import Annotated

import typer

ExistingPathOption = Annotated[
    Path | None,
    typer.Option(
        "--shared-path",
        metavar="PATH.tbl",
        help="The shared table. Default: $SGLANG_ALLOC_TABLE, else the only one in "
        "/dev/shm/sglang-alloc.",
        show_default=False,
    ),
]


def status(
    shared_path: ExistingPathOption = None,
    once: Annotated[
        bool,
        typer.Option("--once", help="Print one look and stop. Default: only if not a terminal."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one look as JSON and stop. Default: no.")
    ] = False,
    interval_seconds: Annotated[
        float,
        typer.Option(
            "--interval-seconds",
            metavar="SECONDS",
            min=0.1,
            help="Time between two looks, at least 0.1 seconds.",
        ),
    ] = 1.0,
) -> None:
    """Show the budget asked for, what each rank has in force, and what it measures."""
    # Imported here because help must not wait for numpy and rich.
    from sglang_alloc import status_view
    from sglang_alloc.table_path import find_shared_path

    path = find_shared_path(shared_path)
    if as_json:
        typer.echo(status_view.as_json(path))
    elif once or not sys.stdout.isatty():
        status_view.print_once(path)
    else:
        status_view.watch(path, interval_seconds)
