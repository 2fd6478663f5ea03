"""`sglang-alloc version`: what a bug report needs to name."""

import platform
from importlib import metadata

import typer

from sglang_alloc import __version__


def version() -> None:
    """Print the versions of sglang-alloc, SGLang, torch, numpy and Python."""
    typer.echo(f"sglang-alloc {__version__}")
    for name in ("sglang", "torch", "numpy"):
        typer.echo(f"{name} {_installed(name)}")
    typer.echo(f"python {platform.python_version()}")


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
