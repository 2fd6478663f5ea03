"""Simulator check, last step: a figure of the served and the simulated runs over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sglang_alloc.bench.simulator_check.errors import waiting_at
from sglang_alloc.bench.simulator_check.felt import Run, Served

_SERVED, _SIMULATED = "#8a8f98", "#0b6e69"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceef1",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def write_figure(path: Path, served: Served, simulated: Sequence[Run]) -> None:
    """Draw TTFT by due time and the queue for each run, and the controller's budgets, as PNG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11.0, 7.2), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(3, len(served.runs), sharex=True, squeeze=False).tolist()
        for column, (run, model) in enumerate(zip(served.runs, simulated, strict=True)):
            ttft, queue, budgets = (row[column] for row in grid)
            ttft.set_title(run.name)
            _draw_ttft(ttft, served, run, _SERVED, "served")
            _draw_ttft(ttft, served, model, _SIMULATED, "simulated")
            for one, colour in ((run, _SERVED), (model, _SIMULATED)):
                seconds = range(round(served.phases[-1][2]))
                waiting = [waiting_at(served, one, second) for second in seconds]
                queue.plot(seconds, waiting, color=colour, lw=1.4)
                _draw_budgets(budgets, one, colour, served.phases[-1][2])
            for axes in (ttft, queue):
                axes.set_ylim(bottom=0)
            for _, start, _ in served.phases[1:]:
                for axes in (ttft, queue, budgets):
                    axes.axvline(start, color="#d9dce1", lw=1, zorder=0)
        _label(grid, served)
        figure.savefig(path, dpi=110)


def _draw_ttft(axes: Axes, served: Served, run: Run, colour: str, name: str) -> None:
    points = [
        (request.due_second, felt.ttft_seconds)
        for request, felt in zip(served.requests, run.felt, strict=True)
        if not math.isnan(felt.ttft_seconds)
    ]
    seconds, ttfts = zip(*points, strict=True)
    axes.plot(seconds, ttfts, ".", ms=3, color=colour, label=name)


def _draw_budgets(axes: Axes, run: Run, colour: str, end: float) -> None:
    seconds = [*(max(0.0, one.second) for one in run.budgets), end]
    for style, phase in (("-", "prefill"), (":", "decode")):
        for steps, alpha in ((phase, 1.0), (f"calm_{phase}", 0.4)):
            values = [getattr(one, f"{steps}_budget") for one in run.budgets]
            values.append(values[-1])
            axes.step(seconds, values, style, where="post", color=colour, lw=1.4, alpha=alpha)
    axes.set_ylim(bottom=0)


def _label(grid: Sequence[Sequence[Axes]], served: Served) -> None:
    for row, name in zip(
        grid,
        (
            "TTFT, seconds",
            "without a first token,\nrequests",
            "budget, activations\n(decode dotted, calm steps pale)",
        ),
        strict=True,
    ):
        row[0].set_ylabel(name)
    for axes in grid[-1]:
        axes.set_xlabel("seconds; requests by their due time")
        axes.set_xlim(0, served.phases[-1][2])
    grid[0][0].legend(loc="upper left")
