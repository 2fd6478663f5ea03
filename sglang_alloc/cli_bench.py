"""`sglang-alloc bench`: the step times of a server at every budget, for the cost model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sglang_alloc.errors import ConfigurationError


def bench(
    context: typer.Context,
    *,
    model_path: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The checkpoint, as SGLang is to serve it. Default: the bundled reference model.",
            show_default=False,
        ),
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLES.npz",
            help="Its budget tables. Default: budget_tables.npz in the model's folder.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="For latency.csv and the servers' logs."
        ),
    ] = Path("out/bench"),
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text that prompts are cut from, UTF-8. Repeatable. Default: bundled text.",
        ),
    ] = None,
    mode: Annotated[
        Literal["layer", "token", "threshold", "union"] | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="As for `serve`: layer, token, threshold or union. Default: threshold if the "
            "tables have thresholds, else layer.",
            show_default=False,
        ),
    ] = None,
    routing: Annotated[
        Literal["engine", "fused"],
        typer.Option(
            metavar="engine|fused",
            help="As for `serve`.",
            envvar="SGLANG_ALLOC_ROUTING",
            show_envvar=False,
        ),
    ] = "engine",
    stock: Annotated[
        bool | None,
        typer.Option(
            "--stock/--no-stock",
            help="Measure stock SGLang in turn with every budget; both servers must then fit into "
            "memory at once. Without it the CSV says nothing of stock. Default: yes on a CPU, no "
            "on a GPU.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|full|0.5x",
            help="Activations per token to measure besides full. Repeatable. Default: one below "
            "full, 5/6, 2/3, 1/2 and 1/3 of it, and the smallest.",
            show_default=False,
        ),
    ] = None,
    decode_batches: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Running requests of a decode step. Default: 1,8,32, on a GPU 1,8,32,128.",
            show_default=False,
        ),
    ] = None,
    prefill_batches: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Prompts of a prefill. Default: 1,8,32, on a GPU 1,2,4,8.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of each prompt. Default: 256, on a GPU 1024.", show_default=False
        ),
    ] = None,
    decode_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Timed in a row. Default: 32, on a GPU 128.", show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that all is measured.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
) -> None:
    """Time decode steps and prefills of a real SGLang server at every budget.

    Everything after [bold]--[/] goes to SGLang: give what you serve with, for example
    sglang-alloc bench --model-path MODEL --tables tables.npz [bold]--[/] --tp-size 8. The device is
    that of --device there, or the one that SGLang finds. What it writes, latency.csv, is the cost
    model's input: `sglang-alloc-controller advise`, `simulate --bench` and `quality.cost_model`.
    """
    # Imported here because help must not wait for numpy.
    from rich.console import Console

    from sglang_alloc.bench.options import Asked, make_options
    from sglang_alloc.bench.run import run_bench
    from sglang_alloc.cli_interruption import interruptible

    asked = Asked(
        model_path=model_path,
        tables=tables,
        texts=text or (),
        mode=mode,
        routing=routing,
        stock=stock,
        budgets=budget or (),
        decode_batches=_counts("--decode-batches", decode_batches),
        prefill_batches=_counts("--prefill-batches", prefill_batches),
        prompt_tokens=prompt_tokens,
        decode_steps=decode_steps,
        rounds=rounds,
        seed=seed,
        out=output,
        arguments=tuple(context.args),
    )
    options = make_options(asked)
    with interruptible("Interrupted: every server is stopped, nothing was written."):
        typer.echo(run_bench(options, Console(stderr=True)))
    typer.echo(f"Wrote {options.out / 'latency.csv'}.", err=True)


def _counts(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigurationError(
            f"{option} {text!r} is not a list of sizes: give numbers from 1 on with commas "
            "between, for example 1,8,32."
        )
    return tuple(sorted({int(part) for part in parts}))
