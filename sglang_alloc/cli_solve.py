"""`sglang-alloc solve`: the best quotas of every budget, from sensitivities."""

from pathlib import Path
from typing import Annotated

import typer


def solve(
    sensitivity: Annotated[
        Path,
        typer.Argument(
            metavar="SENSITIVITY.npz",
            help="What `profile` measured, or any file with an array `sensitivity` (MoE layers, "
            "top-k): column j is the loss when the layer keeps its top j+1.",
        ),
    ],
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="TABLES.npz", help="Where to write.")
    ],
    min_quota: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[LAYER=]K", help="Keep at least K experts, in one layer or all. Repeatable."
        ),
    ] = None,
    max_quota: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[LAYER=]K", help="Keep at most K experts below full budget. Repeatable."
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER=K", help="Keep exactly K below full budget. Repeatable."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw quotas and predicted loss by budget."),
    ] = None,
) -> None:
    """Find the quotas of least summed loss for every budget, exactly and in one pass.

    Equal losses go to the row that keeps more experts, then to the larger quota of the last layer,
    then of the last but one, and so on. Full budget is the unchanged model whatever the bounds.
    """
    # Imported here because help must not wait for numpy.
    from sglang_alloc.sensitivity_file import load_sensitivities
    from sglang_alloc.solve_bounds import parse_bounds
    from sglang_alloc.solve_tables import solve_file
    from sglang_alloc.solve_view import require_picture, solution_text, write_picture

    if plot is not None:
        require_picture(plot)
    loaded = load_sensitivities(sensitivity)
    bounds = parse_bounds(
        loaded.layer_ids, loaded.top_k, min_quota or (), max_quota or (), pin or ()
    )
    solution = solve_file(loaded, bounds, output)
    name = loaded.model.model_id if loaded.model else sensitivity.name
    typer.echo(solution_text(solution, loaded.layer_ids))
    if plot is not None:
        write_picture(plot, solution, loaded.layer_ids, f"Quotas of {name}")
    typer.echo(
        f"Solved {name}: {len(solution.budgets)} budgets from {solution.budgets[0]} to "
        f"{solution.budgets[-1]} over {len(loaded.layer_ids)} layers, written to {output}",
        err=True,
    )
