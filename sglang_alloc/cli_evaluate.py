"""`sglang-alloc evaluate`: what every rule costs in quality, at equal measured activations."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A reference model: qwen3_moe or olmoe.")
    ],
    *,
    tables: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLES.npz", help="Its budget tables. Default: budget_tables.npz beside it."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Default: out/evaluate/MODEL."),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=32, help="Pieces of held-out text, a multiple of 32.")
    ] = 64,
    questions: Annotated[int, typer.Option(min=4, help="Of each exact-answer task.")] = 64,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="Compare the losses of the default with this rule alone, for example on more "
            "windows. Repeatable.",
        ),
    ] = None,
    fraction: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=1, help="Of the full budget. Repeatable. Default: 1/3, 1/2, 2/3 and 5/6."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Points measured at once.")] = 2,
) -> None:
    """Compare the modes with published rules, and write CSV, plots and QUALITY.md.

    Runs in this process on a reference model, through the code that the server runs, and goes on
    from what is in the output folder. A real checkpoint is evaluated through its server:
    [bold]sglang-alloc evaluate-served[/].
    """
    # Imported here because help must not wait for torch.
    from rich.console import Console

    from sglang_alloc.cli_interruption import interruptible
    from sglang_alloc.errors import ConfigurationError
    from sglang_alloc.evaluation.material import Sizes
    from sglang_alloc.evaluation.run import FRACTIONS, JOURNAL_NAME, Evaluation
    from sglang_alloc.evaluation.run import evaluate as run

    if windows % 32:
        raise ConfigurationError(
            f"{windows} windows were asked for; decode batches of 32 need a multiple of 32."
        )
    asked = Evaluation(
        model,
        tables or model / "budget_tables.npz",
        output or Path("out/evaluate") / model.name,
        Sizes(windows=windows, questions=questions),
        fractions=fraction or FRACTIONS,
        rivals=rival or (),
        workers=workers,
    )
    kept = asked.output / JOURNAL_NAME
    with interruptible(
        f"Interrupted. What was measured is in {kept}; the same command goes on from there."
    ):
        report = run(asked, Console(stderr=True))
    typer.echo(f"wrote {report}")
