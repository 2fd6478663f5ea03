"""What is going on and how long it will still take, on a terminal or as plain lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_LINE_EVERY_SECONDS = 10.0


class Stage(NamedTuple):
    """One part of the work and how long it usually takes."""

    name: str
    expected_seconds: float


class StageProgress:
    """Progress over a fixed list of stages; call `note` as often as you like.

    A terminal gets one moving bar, anything else a line per stage and one every ten seconds.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages = list(stages)
        self._console = console
        self._clock = clock
        self._position = 0
        self._stage_started = clock()
        self._line_printed = clock()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]}  {task.fields[note]}"),
            console=console,
            transient=True,
        )
        total = sum(stage.expected_seconds for stage in stages)
        self._task = self._bar.add_task("", total=total, left="", note="")

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar for the duration of the block, on a terminal."""
        with self._bar if self._console.is_terminal else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Mark the block as the stage `name`, which comes after the stages before it."""
        self._position = [stage.name for stage in self._stages].index(name)
        self._stage_started = self._clock()
        self._line_printed = self._stage_started - PLAIN_LINE_EVERY_SECONDS
        self.note("started")
        yield
        self._position += 1
        self._stage_started = self._clock()

    def seconds_left(self) -> float:
        """Return the expected time of what is left; a late stage counts as about to end."""
        if self._position >= len(self._stages):
            return 0.0
        current, *later = self._stages[self._position :]
        spent = self._clock() - self._stage_started
        left_of_current = max(0.0, current.expected_seconds - spent)
        return left_of_current + sum(stage.expected_seconds for stage in later)

    def note(self, text: str) -> None:
        """Say what is going on within the stage."""
        name = self._stages[min(self._position, len(self._stages) - 1)].name
        left = time_left_text(self.seconds_left())
        if self._console.is_terminal:
            total = sum(stage.expected_seconds for stage in self._stages)
            self._bar.update(
                self._task,
                description=name,
                completed=total - self.seconds_left(),
                left=left,
                note=text[:60],
            )
            return
        now = self._clock()
        if now - self._line_printed >= PLAIN_LINE_EVERY_SECONDS:
            self._line_printed = now
            self._console.print(
                f"{name}: {text} ({left})", highlight=False, markup=False, soft_wrap=True
            )


def time_left_text(seconds: float) -> str:
    """Return `about 2 min 10 s left`, rounded to five seconds."""
    rounded = int(5 * round(seconds / 5))
    if rounded >= 60:
        return f"about {rounded // 60} min {rounded % 60:02d} s left"
    return f"about {rounded} s left"
