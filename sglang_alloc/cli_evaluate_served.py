"""`sglang-alloc evaluate-served`: a real checkpoint at a fixed budget, by lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate_served(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the server, without /v1.")],
    *,
    table: Annotated[
        Path, typer.Option(metavar="FILE", help="The shared table that the server was given.")
    ],
    budget: Annotated[
        list[str],
        typer.Option(
            metavar="N|full|0.5x",
            help="Activations per token, for prefill and decode. Repeatable: one run each.",
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option(metavar="FOLDER", help="Of the model that is served, or its name.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="One folder per budget.")
    ] = Path("out/evaluate-served"),
) -> None:
    """Run lm-evaluation-harness against a server whose budget is held fixed meanwhile.

    Everything after [bold]--[/] goes to lm_eval, for example:
    sglang-alloc evaluate-served http://127.0.0.1:30000 --table /dev/shm/sglang-alloc/MODEL.tbl
    --budget 0.5x --budget full --tokenizer MODEL [bold]--[/] --tasks gsm8k --limit 200
    """
    # Imported here because help must not wait for numpy.
    from sglang_alloc.cli_interruption import interruptible
    from sglang_alloc.cli_set import parse_budget
    from sglang_alloc.evaluation.harness import HarnessRun, Measured, run_harness
    from sglang_alloc.evaluation.harness_results import Score, read_scores, summary, write_scores
    from sglang_alloc.shared_table import SharedTable

    with SharedTable.open(table) as opened:
        budgets = [parse_budget(text, opened.shape) for text in budget]
    runs: list[tuple[int, Measured, list[Score]]] = []
    for one in dict.fromkeys(budgets):
        folder = output / f"budget-{one}"
        kept = f"{output / 'scores.csv'} has the budgets before it" if runs else "nothing was kept"
        with interruptible(f"Interrupted: budget {one} was released unfinished, {kept}."):
            measured = run_harness(HarnessRun(url, table, one, tokenizer, folder, context.args))
        scores = read_scores(folder)
        typer.echo(summary(one, measured, scores))
        # After each run: an interruption loses only the run under way.
        runs.append((one, measured, scores))
        write_scores(output / "scores.csv", runs)
    typer.echo(f"wrote {output / 'scores.csv'}")
