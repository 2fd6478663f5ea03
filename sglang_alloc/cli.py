"""The command `sglang-alloc`: serve with a budget, publish its tables, look at it, set it by hand.

Each command imports what it needs when it runs, so that help and completion answer at once.
"""

import sys
from typing import Any

import typer
from typer.core import TyperCommand

from sglang_alloc.cli_bench import bench
from sglang_alloc.cli_calibrate import calibrate
from sglang_alloc.cli_evaluate import evaluate
from sglang_alloc.cli_evaluate_served import evaluate_served
from sglang_alloc.cli_profile import profile
from sglang_alloc.cli_publish import publish
from sglang_alloc.cli_serve import serve
from sglang_alloc.cli_set import set_budget
from sglang_alloc.cli_solve import solve
from sglang_alloc.cli_status import status
from sglang_alloc.cli_version import version
from sglang_alloc.errors import AllocError
from sglang_alloc.standard_streams import tolerant_streams


class PassesOn(TyperCommand):
    """A command that gives everything after `--` to another program: its own arguments go first."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the arguments, then the options and what follows `--`."""
        options, *arguments = super().collect_usage_pieces(ctx)
        return [*arguments, options]


app = typer.Typer(
    name="sglang-alloc",
    help="Trade a little Mixture-of-Experts quality for latency in SGLang.\n\n"
    "A budget is the number of routed-expert activations per token, summed over the MoE layers. "
    "The controller moves it; these commands publish, serve, watch and override it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(
    cls=PassesOn,
    options_metavar="[OPTIONS] -- [SGLANG OPTIONS]",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        # SGLang has a -h of its own.
        "help_option_names": ["--help"],
    },
)(serve)
app.command(
    cls=PassesOn,
    options_metavar="[OPTIONS] -- [SGLANG OPTIONS]",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": False},
)(profile)
app.command()(solve)
app.command(
    cls=PassesOn,
    options_metavar="[OPTIONS] -- [SGLANG OPTIONS]",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": False},
)(calibrate)
app.command(
    cls=PassesOn,
    options_metavar="[OPTIONS] -- [SGLANG OPTIONS]",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": False},
)(bench)
app.command()(evaluate)
app.command(
    "evaluate-served",
    cls=PassesOn,
    options_metavar="[OPTIONS] -- [LM_EVAL OPTIONS]",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": False},
)(evaluate_served)
app.command()(publish)
app.command()(status)
app.command("set")(set_budget)
app.command()(version)


def main() -> None:
    """Run the command line; an error that a user can cause is one sentence and exit status 1."""
    with tolerant_streams("sglang-alloc"):
        try:
            app()
        except AllocError as error:
            typer.secho("error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
            typer.echo(str(error), err=True)
            sys.exit(1)


if __name__ == "__main__":
    main()
