"""`sglang-alloc publish`: put budget tables where the server and the controller meet."""

from pathlib import Path
from typing import Annotated

import typer

from sglang_alloc.allocation_mode import Mode

SharedPathOption = Annotated[
    Path | None,
    typer.Option(
        "--shared-path",
        metavar="PATH.tbl",
        help="Where to publish, in a folder that is there. Default: MODEL.tbl in "
        "/dev/shm/sglang-alloc.",
        show_default=False,
    ),
]


def publish(
    tables: Annotated[
        Path, typer.Argument(metavar="TABLES.npz", help="Budget tables made by profiling.")
    ],
    shared_path: SharedPathOption = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="The one mode that servers of this table run in, whose predicted loss the "
            "controller then takes. Default: the best that the tables support, as `serve` does.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Publish budget tables for a server and a controller to share, at full budget.

    An earlier table at that path is replaced in one step. A server that has it open keeps it until
    it is started again.
    """
    # Imported here because help must not wait for numpy.
    from sglang_alloc.allocation_mode import default_mode, require_support
    from sglang_alloc.budget_tables import load_budget_tables
    from sglang_alloc.shared_table import publish_shared_table
    from sglang_alloc.table_path import default_shared_path, require_folder

    loaded = load_budget_tables(tables)
    has_section = loaded.arrays().__contains__
    note = mode or default_mode(has_section)
    require_support(note, has_section, loaded.model_id)
    path = shared_path or default_shared_path(loaded.model_id)
    require_folder(path)
    warn_of_running_servers(path)
    publish_shared_table(path, loaded, mode_note=note)
    typer.echo(
        f"Published {loaded.model_id} ({loaded.num_layers} MoE layers, top-{loaded.top_k} of "
        f"{loaded.num_experts} experts, budgets {loaded.budget_min} to {loaded.budget_max}) at "
        f"{path}"
    )


def warn_of_running_servers(path: Path) -> None:
    """Say on stderr which living processes will keep the earlier table at `path`."""
    from sglang_alloc.table_status import living_workers

    pids = living_workers(path)
    if pids:
        listed = ", ".join(str(pid) for pid in pids)
        typer.echo(
            f"warning: the server of pid {listed} keeps the earlier table at {path} until it is "
            "started again, and the controller will no longer steer it",
            err=True,
        )
