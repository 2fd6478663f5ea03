"""Control story, the door: `sglang-alloc-controller run | check | replay | schema`."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sglang_alloc.errors import AllocError

app = typer.Typer(
    help="Keep SGLang's latency SLOs by moving the activation budget in the shared table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigPath = Annotated[
    Path,
    typer.Option("--config", "-c", help="The YAML file with the settings.", show_default=False),
]
# Exit codes: a person must act (configuration, table) or a check failed.
_EXIT_REFUSED = 2
_EXIT_CHECK_FAILED = 1
_EXIT_DIFFERS = 1


@app.command()
def run(config: ConfigPath) -> None:
    """Control until SIGTERM, then leave the server at full quality."""
    from sglang_alloc_controller.run import run as run_controller
    from sglang_alloc_controller.settings import load_settings

    try:
        run_controller(config, load_settings(config))
    except AllocError as error:
        _refuse(error)


@app.command()
def check(config: ConfigPath) -> None:
    """Try the configuration, the shared table, the source and the bucket edges."""
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
def schema() -> None:
    """Print the JSON schema of the configuration file."""
    from sglang_alloc_controller.settings import json_schema

    typer.echo(json_schema(), nl=False)


def main() -> None:
    """Run the command line."""
    app()


def _refuse(error: AllocError) -> NoReturn:
    typer.echo(f"sglang-alloc-controller: {error}", err=True)
    raise typer.Exit(_EXIT_REFUSED)
