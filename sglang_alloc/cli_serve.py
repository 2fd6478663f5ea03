"""`sglang-alloc serve`: start SGLang with a budget, after checking all that can be checked."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from sglang_alloc.allocation_mode import Mode
from sglang_alloc.cli_publish import SharedPathOption, warn_of_running_servers


def serve(
    context: typer.Context,
    *,
    table: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Budget tables (.npz), which are published first, or a shared table (.tbl) that "
            "is published already.",
            envvar="SGLANG_ALLOC_TABLE",
            show_envvar=False,
            show_default=False,
        ),
    ],
    shared_path: SharedPathOption = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="How a layer spends its quota: layer, token, threshold or union. Default: "
            "threshold if the table has thresholds, else layer.",
            envvar="SGLANG_ALLOC_MODE",
            show_envvar=False,
            show_default=False,
        ),
    ] = None,
    fallback: Annotated[
        str,
        typer.Option(
            metavar="full|hold|N",
            help="Budget while no controller is alive: full quality, the last one, or N "
            "activations per token. Default: full.",
            envvar="SGLANG_ALLOC_FALLBACK",
            show_envvar=False,
            show_default=False,
        ),
    ] = "full",
    stale_after_seconds: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Age of the controller's heartbeat after which the fallback holds. Default: 10.",
            envvar="SGLANG_ALLOC_STALE_AFTER_SECONDS",
            show_envvar=False,
            show_default=False,
        ),
    ] = 10.0,
    request_budgets: Annotated[
        Literal["off", "lower", "any"],
        typer.Option(
            metavar="off|lower|any",
            help="What requests may ask for themselves: nothing, a lower budget, or full quality "
            "too. Default: lower.",
            envvar="SGLANG_ALLOC_REQUEST_BUDGETS",
            show_envvar=False,
            show_default=False,
        ),
    ] = "lower",
    protected_priority: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Requests of this priority, or a more urgent one, are served at full quality.",
            envvar="SGLANG_ALLOC_PROTECTED_PRIORITY",
            show_envvar=False,
            show_default=False,
        ),
    ] = None,
    priority_floors: Annotated[
        str,
        typer.Option(
            metavar="P:N,P:N,...",
            help="Requests of priority P, or a more urgent one, are not served below N activations "
            "per token, or below full quality (P:full); from the least urgent to the most urgent.",
            envvar="SGLANG_ALLOC_PRIORITY_FLOORS",
            show_envvar=False,
            show_default=False,
        ),
    ] = "",
    correct_drift: Annotated[
        bool,
        typer.Option(
            "--correct-drift",
            help="Let thresholds follow, slowly, what they keep of the traffic. A request's output "
            "then depends a little on earlier ones, and calm steps have no budgets of their own. "
            "Default: no.",
            envvar="SGLANG_ALLOC_CORRECT_DRIFT",
            show_envvar=False,
            show_default=False,
        ),
    ] = False,
    routing: Annotated[
        Literal["engine", "fused"],
        typer.Option(
            metavar="engine|fused",
            help="Who chooses a token's experts: SGLang's own functions, or on a GPU one kernel "
            "that also drops slots, which is faster and may differ in the last bits of a weight. "
            "Default: engine.",
            envvar="SGLANG_ALLOC_ROUTING",
            show_envvar=False,
            show_default=False,
        ),
    ] = "engine",
) -> None:
    """Serve a MoE model with SGLang under a budget.

    Everything after [bold]--[/] goes to SGLang unchanged, for example:
    sglang-alloc serve --table tables.npz [bold]--[/] --model-path MODEL --enable-metrics

    Options left out come from the environment where it has them: SGLANG_ALLOC_TABLE,
    SGLANG_ALLOC_MODE, SGLANG_ALLOC_FALLBACK, SGLANG_ALLOC_STALE_AFTER_SECONDS,
    SGLANG_ALLOC_REQUEST_BUDGETS, SGLANG_ALLOC_PROTECTED_PRIORITY, SGLANG_ALLOC_PRIORITY_FLOORS,
    SGLANG_ALLOC_CORRECT_DRIFT and SGLANG_ALLOC_ROUTING.
    """
    # Imported here because help must not wait for numpy.
    from sglang_alloc import launch_checks, serve_table

    arguments = context.args
    launch_checks.require_sglang()
    launch_checks.require_plugin_allowed(os.environ)
    source = serve_table.read_source(table, shared_path)
    options = serve_table.WorkerOptions(
        mode,
        fallback,
        stale_after_seconds,
        request_budgets,
        protected_priority,
        priority_floors,
        correct_drift,
        routing,
    )
    environment = serve_table.worker_environment(source, options)
    launch = launch_checks.launch_arguments(arguments)
    launch_checks.require_same_model(launch.model_path, source.fingerprint, source.model_id)
    launch_checks.require_free_port(launch.host, launch.port)
    warn_of_running_servers(source.shared_path)
    if "--enable-metrics" not in arguments:
        typer.echo("warning: the controller reads metrics; add --enable-metrics", err=True)
    serve_table.publish_source(source, mode)
    _become_sglang(arguments, environment)


def _become_sglang(arguments: list[str], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "sglang.launch_server", *arguments]
    settings = " ".join(f"{name}={value}" for name, value in environment.items() if value)
    typer.echo(f"{settings} {shlex.join(command)}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, os.environ | environment)
