"""Offline story, profiling: tokens done, tokens left and time left, in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TokenProgress:
    """A bar in forward tokens; its end comes nearer when probes stop early."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("starting the server", total=None, tokens="")

    def __enter__(self) -> TokenProgress:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def stage(self, name: str, total_tokens: int) -> None:
        """Begin a bar of its own."""
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(
            name, total=max(total_tokens, 1), tokens=f"0/{total_tokens:,} tokens"
        )

    def advance(self, tokens: int, tokens_left: int) -> None:
        """Move the bar; within a chunk the stage cannot be longer than it was thought to be."""
        task = self._progress.tasks[-1]
        done = task.completed + tokens
        total = max(min(task.total or done, done + tokens_left + tokens), done)
        self._progress.update(
            self._task, completed=done, total=total, tokens=f"{done:,.0f}/{total:,.0f} tokens"
        )

    def wait(self, text: str) -> None:
        """Say what the server's start is waiting for."""
        self._progress.update(self._task, description=f"starting the server: {text}", total=None)
