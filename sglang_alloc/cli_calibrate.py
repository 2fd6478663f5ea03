"""`sglang-alloc calibrate`: complete budget tables, with the thresholds of mode threshold."""

from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    context: typer.Context,
    sensitivity: Annotated[
        Path, typer.Argument(metavar="SENSITIVITY.npz", help="What `profile` measured.")
    ],
    *,
    model_path: Annotated[Path, typer.Option(metavar="FOLDER", help="The checkpoint.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="TABLES.npz", help="Where to write.")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Calibration text, UTF-8. Repeatable. Default: bundled text."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=4, help="Pieces of text.")] = 32,
    window_tokens: Annotated[int, typer.Option(min=2, help="Of each piece.")] = 512,
    chunk: Annotated[int, typer.Option(min=1, help="Windows in one request.")] = 8,
    corrections: Annotated[
        bool,
        typer.Option(
            "--corrections/--no-corrections",
            help="Look for references and gains that lower the loss. About half of the time.",
        ),
    ] = True,
    min_quota: Annotated[
        list[str] | None, typer.Option(metavar="[LAYER=]K", help="As for `solve`.")
    ] = None,
    max_quota: Annotated[
        list[str] | None, typer.Option(metavar="[LAYER=]K", help="As for `solve`.")
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option(metavar="LAYER=K", help="As for `solve`.")
    ] = None,
) -> None:
    """Solve what was profiled and, for mode threshold, find the thresholds of every budget.

    Everything after [bold]--[/] goes to SGLang. Without a profile of mode threshold no server is
    needed and `sglang-alloc solve` gives the same tables.
    """
    # Imported here because help must not wait for numpy.
    from rich.console import Console

    from sglang_alloc.budget_tables import save_budget_tables
    from sglang_alloc.calibrate_run import run_calibration
    from sglang_alloc.cli_interruption import interruptible
    from sglang_alloc.cli_profile_run import make_job
    from sglang_alloc.profile_progress import TokenProgress
    from sglang_alloc.profile_settings import ProfileSettings
    from sglang_alloc.sensitivity_file import load_sensitivities
    from sglang_alloc.solve_bounds import parse_bounds

    loaded = load_sensitivities(sensitivity)
    bounds = parse_bounds(
        loaded.layer_ids, loaded.top_k, min_quota or (), max_quota or (), pin or ()
    )
    settings = ProfileSettings(
        windows=windows,
        prefix_tokens=window_tokens - 1,
        continuation_tokens=1,
        chunk_windows=chunk,
    )
    name = loaded.model.model_id if loaded.model else None
    job = make_job(
        model_path, text or [], settings, model_id=name, output=output, arguments=context.args
    )
    with (
        interruptible("Interrupted: the server is stopped, nothing was written."),
        TokenProgress(Console(stderr=True)) as progress,
    ):
        found = run_calibration(job, loaded, bounds, progress, corrections=corrections)
    save_budget_tables(output, found.tables)
    typer.echo(f"Wrote {output}.")
    if found.heldout_error is not None:
        typer.echo(
            f"On held-out windows the thresholds keep the activations asked for to within "
            f"{found.heldout_error:.1%}."
        )
