"""Names of options and usage lines that hold in every release of typer that is allowed."""

from __future__ import annotations

import inspect
from typing import Annotated, get_args, get_origin

import pytest
import typer
from typer.models import OptionInfo
from typer.testing import CliRunner

from sglang_alloc.cli import app as serving
from sglang_alloc_controller.cli import app as controlling


def _options(app: typer.Typer) -> list[tuple[str, str, OptionInfo]]:
    """Return (command, parameter, option) of everything that is no positional argument."""
    found = []
    for command in app.registered_commands:
        assert command.callback is not None
        signature = inspect.signature(command.callback, eval_str=True)
        for name, parameter in signature.parameters.items():
            if get_origin(parameter.annotation) is Annotated:
                infos = get_args(parameter.annotation)[1:]
                found += [(command.callback.__name__, name, i) for i in infos]
    return [entry for entry in found if isinstance(entry[2], OptionInfo)]


def _says_its_name(option: OptionInfo) -> bool:
    """Within Annotated, typer keeps the first name given where a default would be."""
    return any(str(name).startswith("--") for name in (option.default, *(option.param_decls or ())))


@pytest.mark.parametrize("app", [serving, controlling], ids=["sglang-alloc", "controller"])
def test_an_option_whose_metavar_is_its_name_says_its_name(app: typer.Typer) -> None:
    """typer 0.27 took `--MODE` for the name of `mode` with metavar MODE, and `--mode` for none."""
    options = _options(app)
    assert len(options) >= 10
    unnamed = [
        (command, name)
        for command, name, option in options
        if option.metavar and option.metavar.lower() == name and not _says_its_name(option)
    ]
    assert unnamed == []


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("calibrate", "calibrate {SENSITIVITY.npz} [OPTIONS] -- [SGLANG OPTIONS]"),
        ("evaluate-served", "evaluate-served {URL} [OPTIONS] -- [LM_EVAL OPTIONS]"),
        ("profile", "profile [OPTIONS] -- [SGLANG OPTIONS]"),
        ("bench", "bench [OPTIONS] -- [SGLANG OPTIONS]"),
        ("serve", "serve [OPTIONS] -- [SGLANG OPTIONS]"),
    ],
)
def test_a_usage_line_puts_arguments_where_they_can_go(command: str, usage: str) -> None:
    shown = " ".join(CliRunner().invoke(serving, [command, "--help"]).output.split())
    # Releases differ in the brackets around an argument that is required.
    assert usage in shown or usage.replace("{", "").replace("}", "") in shown


@pytest.mark.parametrize("app", [serving, controlling], ids=["sglang-alloc", "controller"])
def test_h_asks_for_help_of_the_program_and_of_its_commands(app: typer.Typer) -> None:
    # SGLang has a -h of its own, behind `serve`.
    commands = [
        info.name or info.callback.__name__ for info in app.registered_commands if info.callback
    ]
    for asked in ([], *([name] for name in commands if name != "serve")):
        result = CliRunner().invoke(app, [*asked, "-h"])
        assert (asked, result.exit_code) == (asked, 0)
        assert "Usage:" in result.output
