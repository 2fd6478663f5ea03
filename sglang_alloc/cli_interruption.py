"""The command line: what a command that starts or asks a server says when it is interrupted."""

import contextlib
from collections.abc import Iterator

import typer

from sglang_alloc.server_runs.interruption import sigterm_interrupts

_EXIT_CODE = 130


@contextlib.contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the command with 130, after `message` on standard error."""
    try:
        with sigterm_interrupts():
            yield
    except KeyboardInterrupt:
        typer.echo(message, err=True)
        raise typer.Exit(_EXIT_CODE) from None
