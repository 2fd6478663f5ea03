"""Control story, the door: the commands of `sglang-alloc-controller`."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sglang_alloc.errors import AllocError
from sglang_alloc.standard_streams import tolerant_streams

app = typer.Typer(
    help="Keep SGLang's latency SLOs by moving the activation budget in the shared table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ConfigPath = Annotated[
    Path,
    typer.Option("--config", "-c", help="The YAML file with the settings.", show_default=False),
]
# Exit codes: a person must act (configuration, table) or a check failed.
_EXIT_REFUSED = 2
_EXIT_CHECK_FAILED = 1
_EXIT_DIFFERS = 1
_EXIT_INTERRUPTED = 130


@app.command()
def run(
    config: ConfigPath,
    retry_seconds: Annotated[
        float | None,
        typer.Option(
            "--retry-seconds",
            metavar="SECONDS",
            min=0.1,
            help="When it refuses to work, log why and try again after this long, for a container "
            "whose end would harm its pod. Default: end with exit code 2.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Control until SIGTERM, then leave the server at full quality."""
    from sglang_alloc_controller.run import run as run_controller
    from sglang_alloc_controller.run import run_with_retries
    from sglang_alloc_controller.settings import load_settings

    try:
        if retry_seconds is not None:
            run_with_retries(config, retry_seconds)
        else:
            run_controller(config, load_settings(config))
    except AllocError as error:
        _refuse(error)


@app.command()
def check(config: ConfigPath) -> None:
    """Try what `run` needs: settings, shared table, source, bucket edges, token, port and log."""
    from sglang_alloc_controller.check import findings
    from sglang_alloc_controller.settings import load_settings

    try:
        settings = load_settings(config)
    except AllocError as error:
        _refuse(error)
    typer.echo(f"ok       {config} is a valid configuration.")
    failed = False
    for finding in findings(settings):
        typer.echo(f"{finding.level:8} {finding.sentence}")
        failed = failed or finding.level == "failed"
    if failed:
        raise typer.Exit(_EXIT_CHECK_FAILED)


@app.command()
def replay(
    logs: Annotated[list[Path], typer.Argument(help="Decision logs, oldest first.")],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="Settings to decide by. Default: the recorded ones.",
            show_default=False,
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="Write every tick to this file. Default: none.", show_default=False),
    ] = None,
) -> None:
    """Feed recorded decision logs through today's law; exit with 1 if a budget differs."""
    from sglang_alloc_controller.cli_replay import replay_files
    from sglang_alloc_controller.settings import load_settings

    try:
        differs = replay_files(logs, load_settings(config) if config else None, csv)
    except AllocError as error:
        _refuse(error)
    if differs:
        raise typer.Exit(_EXIT_DIFFERS)


@app.command()
def advise(
    *,
    benches: Annotated[
        list[Path],
        typer.Argument(help="CSVs of `sglang-alloc bench`, one for each mode to compare."),
    ],
    tables: Annotated[
        Path, typer.Option(help="The budget tables (.npz) of the model.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the cost model here, for quality.cost_model. Default: print only.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="Mode of the cost model. Default: the one that saves most.", show_default=False
        ),
    ] = None,
    batch: Annotated[
        list[int], typer.Option(min=1, help="Running requests; give it once per batch size.")
    ] = [1, 8, 32],  # noqa: B006 - typer copies it
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of an average request.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of an average request.")] = 128,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Of a prefill step.")] = 2048,
    max_loss: Annotated[
        float, typer.Option(min=0.0, help="Predicted loss to compare at, nats per token.")
    ] = 0.01,
) -> None:
    """Say which budget buys the most latency per loss at each batch size; write a cost model."""
    from sglang_alloc_controller.advisor import RequestShape
    from sglang_alloc_controller.cli_advise import Asked
    from sglang_alloc_controller.cli_advise import advise as advise_on

    shapes = [RequestShape(prompt_tokens, output_tokens, one, chunk_tokens) for one in batch]
    try:
        advise_on(Asked(benches, tables, output, mode, shapes, max_loss))
    except AllocError as error:
        _refuse(error)


@app.command()
def simulate(
    *,
    scenario: Annotated[
        list[str] | None,
        typer.Option(help="A load by name; may be repeated.", show_default=False),
    ] = None,
    law: Annotated[
        list[str] | None,
        typer.Option(
            help="ours, oracle, full or a rival; may be repeated. Default: ours, with --all every "
            "law.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Seed of the arrivals; may be repeated. Default: 1, with --all 1 and 2.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every scenario with every law and the default seeds.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.csv, summary.md and the plots. A run that was interrupted "
            "goes on there. Default: print only.",
            show_default=False,
        ),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            help="CSV of your server's step times, of `sglang-alloc bench`. Default: the "
            "reference model on two CPU cores.",
            show_default=False,
        ),
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option(
            help="Your budget tables, for their predicted losses. Default: those of the "
            "reference model.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Median length of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=1, help="Median length of an answer.")] = 32,
    workers: Annotated[
        int, typer.Option(min=0, help="Worker processes; 0: one for each core.")
    ] = 0,
) -> None:
    """Try the control law and its rivals on a simulated server, and print how they did."""
    from sglang_alloc_controller.cli_simulate import checked
    from sglang_alloc_controller.cli_simulate import simulate as run_simulation
    from sglang_alloc_controller.simulator.deployment import DEFAULT_MIX, read_deployment

    try:
        request = checked(scenario or (), law or (), seed or (), everything)
        mix = DEFAULT_MIX._replace(prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        deployment = read_deployment(bench, tables, mix)
        text = run_simulation(request._replace(out=out, workers=workers), deployment)
    except AllocError as error:
        _refuse(error)
    except KeyboardInterrupt:
        _interrupted(out)
    typer.echo(text, nl=False)


@app.command("simulate-replicas")
def simulate_replicas(
    *,
    replicas: Annotated[
        list[int], typer.Option(min=1, help="Servers behind the balancer; may be repeated.")
    ] = [2, 4, 8, 16, 32, 64],  # noqa: B006 - typer copies it
    balancer: Annotated[
        list[str], typer.Option(help="round-robin or least-requests; may be repeated.")
    ] = ["round-robin", "least-requests"],  # noqa: B006
    load: Annotated[
        list[float],
        typer.Option(
            min=0.01,
            max=10.0,
            help="Load on each server: 1 is what one alone carries at full quality, 2 at the "
            "floor; may be repeated.",
        ),
    ] = [1.4, 1.7],  # noqa: B006
    minutes: Annotated[float, typer.Option(min=3.0, max=1440.0, help="Simulated time.")] = 30.0,
    seed: Annotated[list[int], typer.Option(min=0, help="Of the arrivals; may be repeated.")] = [1],  # noqa: B006
    lost: Annotated[
        list[str],
        typer.Option(
            help="Whether a replica dies at one third of the time: never, for-good, or replaced at "
            "two thirds; may be repeated.",
        ),
    ] = ["never"],  # noqa: B006
    unnoticed: Annotated[
        list[float],
        typer.Option(
            min=0.0,
            max=3600.0,
            help="Seconds that the balancer goes on sending to a dead replica; may be repeated.",
        ),
    ] = [0.0],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for replicas.csv; a run that was interrupted goes on there. Default: "
            "print only.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Worker processes; 0: one for each core.")
    ] = 0,
) -> None:
    """Simulate servers with a control loop each behind one load balancer."""
    from rich.console import Console

    from sglang_alloc_controller.cli_replicas import Fleets, checked, simulate_fleets, table
    from sglang_alloc_controller.cli_simulate import shown_progress
    from sglang_alloc_controller.simulator.deployment import read_deployment

    try:
        fleets = checked(Fleets(replicas, balancer, load, 60 * minutes, seed, lost, unnoticed))
        with shown_progress(Console(stderr=True)) as progress:
            results = simulate_fleets(read_deployment().world, fleets, out, workers, progress)
    except AllocError as error:
        _refuse(error)
    except KeyboardInterrupt:
        _interrupted(out)
    typer.echo(table(results))


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration file."""
    from sglang_alloc_controller.settings import json_schema

    typer.echo(json_schema(), nl=False)


def main() -> None:
    """Run the command line."""
    with tolerant_streams("sglang-alloc-controller"):
        app()


def _refuse(error: AllocError) -> NoReturn:
    typer.echo(f"sglang-alloc-controller: {error}", err=True)
    raise typer.Exit(_EXIT_REFUSED)


def _interrupted(out: Path | None) -> NoReturn:
    kept = f"what is finished is kept in {out}" if out else "give --out to keep what is finished"
    typer.echo(f"sglang-alloc-controller: interrupted; {kept}.", err=True)
    raise typer.Exit(_EXIT_INTERRUPTED)
