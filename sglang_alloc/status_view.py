"""`sglang-alloc status` in the terminal: one look, or a view that follows the table."""

import contextlib
import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sglang_alloc.errors import SharedTableError
from sglang_alloc.shared_table import SharedTable, WorkerCounters
from sglang_alloc.shared_table_words import RUNNING_ANY
from sglang_alloc.table_status import TableStatus, WorkerStatus, table_status

# Long enough for the sampled counters of a quiet server to move.
_WINDOW_SECONDS = 10.0
# The workers' own default before they fall back.
_STALE_AFTER_SECONDS = 10.0


def as_json(path: Path) -> str:
    """Return one look at the table as JSON."""
    with SharedTable.open(path, writable=False) as table:
        looked = table_status(table, time.monotonic_ns())
    return json.dumps(dataclasses.asdict(looked), indent=2)


def print_once(path: Path) -> None:
    """Print one look at the table."""
    with SharedTable.open(path, writable=False) as table:
        Console().print(render(table_status(table, time.monotonic_ns())))


def watch(
    path: Path,
    interval_seconds: float,
    *,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Follow the table until interrupted, also while it is missing or published again."""
    follower = TableFollower(path)
    with (
        contextlib.suppress(KeyboardInterrupt),
        contextlib.closing(follower),
        Live(console=console, auto_refresh=False, transient=False) as live,
    ):
        while True:
            live.update(follower.look(time.monotonic_ns()), refresh=True)
            sleep(interval_seconds)


class TableFollower:
    """Looks at whatever table a path holds now, with means over the last ten seconds."""

    def __init__(self, path: Path) -> None:
        """Follow `path`, which need not exist yet."""
        self._path = path
        self._table: SharedTable | None = None
        self._history: deque[tuple[int, dict[int, WorkerCounters]]] = deque()

    def look(self, now_ns: int) -> RenderableType:
        """Return what to show at `now_ns` (monotonic)."""
        try:
            return self._render(self._current(), now_ns)
        except SharedTableError as error:
            return Panel(Text(str(error), style="yellow"), title="waiting for a shared table")

    def close(self) -> None:
        """Let go of the table."""
        if self._table is not None:
            self._table.close()
        self._table = None
        self._history.clear()

    def _render(self, table: SharedTable, now_ns: int) -> RenderableType:
        counters = {worker.rank: worker for worker in table.worker_counters()}
        self._history.append((now_ns, counters))
        while now_ns - self._history[0][0] > _WINDOW_SECONDS * 1e9:
            self._history.popleft()
        earlier = self._history[0][1] if len(self._history) > 1 else {}
        return render(table_status(table, now_ns, earlier))

    def _current(self) -> SharedTable:
        if self._table is not None and not self._table.is_current():
            self.close()
        if self._table is None:
            self._table = SharedTable.open(self._path, writable=False)
        return self._table


def render(looked: TableStatus) -> RenderableType:
    """Return one look as a panel, readable from 80 columns."""
    title = (
        f"[bold]{escape(looked.model_id)}[/] {looked.num_layers} MoE layers, "
        f"top-{looked.top_k} of {looked.num_experts} experts"
    )
    quality = [_quality_line(looked)] if looked.workers else []
    body = Group(_budgets(looked), *quality, "", _ranks(looked), "", _writer_line(looked))
    return Panel(body, title=title, subtitle=escape(looked.path))


def _budgets(looked: TableStatus) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("activations per token")
    grid.add_column("prefill", justify="right")
    grid.add_column("decode", justify="right")
    grid.add_column("")
    full = looked.budget_max
    grid.add_row("full quality", str(full), str(full), "")
    shares = _shares(looked.prefill_budget, looked.decode_budget, full)
    grid.add_row("controller wants", *shares, f"generation {looked.generation}")
    calm_prefill, calm_decode = looked.calm_prefill_budget, looked.calm_decode_budget
    if calm_prefill is not None and calm_decode is not None:
        note = _calm_steps(looked.calm_running_requests)
        grid.add_row("  in calm steps", *_shares(calm_prefill, calm_decode, full), note)
    if looked.override is not None:
        override = looked.override
        note = f"by {escape(override.actor)}, {_duration(override.seconds_left)} left"
        shares = _shares(override.prefill_budget, override.decode_budget, full)
        grid.add_row("override wants", *shares, note, style="yellow")
    if looked.workers:
        worker = looked.workers[0]
        measured = (worker.prefill_activations_per_token, worker.decode_activations_per_token)
        grid.add_row("measured", *map(_number, measured), "", style="bold")
        calm = (worker.calm_prefill_ratio, worker.calm_decode_ratio)
        if any(ratio is not None for ratio in calm):
            grid.add_row("tokens of calm steps", *map(_percent, calm), "since the start")
    return grid


def _calm_steps(running_requests: int | None) -> str:
    if running_requests is None or running_requests == RUNNING_ANY:
        return "none waits"
    return f"none waits, {running_requests - 1} run at most"


def _quality_line(looked: TableStatus) -> Text:
    worker = looked.workers[0]
    line = Text(f"{worker.kept_mass_ratio:.1%} of router weight kept")
    if worker.distinct_experts_per_layer is not None:
        distinct = f"{worker.distinct_experts_per_layer:.1f}"
        line.append(f", {distinct} distinct experts per layer and decode step")
    return line


def _ranks(looked: TableStatus) -> RenderableType:
    if not looked.workers:
        return Text("no server has taken this table yet", style="yellow")
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("rank")
    grid.add_column("follows")
    headings = ("generation", "prefill", "decode", "steps", "fallbacks", "last step")
    for heading in headings:
        grid.add_column(heading, justify="right")
    for worker in looked.workers:
        seen = f"{_duration(worker.last_step_age_seconds)} ago" if worker.alive else "gone"
        numbers = (
            worker.acknowledged_generation,
            worker.prefill_budget,
            worker.decode_budget,
            worker.steps,
            worker.fallbacks,
        )
        cells = (str(worker.rank), worker.source, *map(str, numbers), seen)
        grid.add_row(*cells, style=_rank_style(worker))
    return grid


def _rank_style(worker: WorkerStatus) -> str:
    if not worker.alive:
        return "dim"
    return "" if worker.source == "controller" else "yellow"


def _writer_line(looked: TableStatus) -> Text:
    age_seconds = looked.heartbeat_age_seconds
    if age_seconds is None:
        return Text("controller: none has written yet", style="yellow")
    style = "green" if -1 <= age_seconds <= _STALE_AFTER_SECONDS else "red"
    line = Text(f"controller: pid {looked.writer_pid}, epoch {looked.writer_epoch}, ")
    return line.append(f"heartbeat {_duration(age_seconds)} ago", style=style)


def _shares(prefill_budget: int, decode_budget: int, full: int) -> tuple[str, str]:
    return (
        f"{prefill_budget} ({prefill_budget / full:.0%})",
        f"{decode_budget} ({decode_budget / full:.0%})",
    )


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _duration(seconds: float) -> str:
    if abs(seconds) < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
