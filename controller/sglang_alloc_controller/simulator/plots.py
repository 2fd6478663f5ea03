"""Simulator, the command: a scenario's course as one picture, and all scenarios on another."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sglang_alloc_controller.simulator.cells import Finished
from sglang_alloc_controller.simulator.law_names import FULL, ORACLE, OURS
from sglang_alloc_controller.simulator.results import Verdict
from sglang_alloc_controller.simulator.timeline import Timeline

_COLOURS = {OURS: "#0b6e69", ORACLE: "#d1812f", FULL: "#8a8f98"}
_RIVAL_COLOUR, _LOAD_COLOUR = "#b7bcc4", "#5f6368"
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceef1",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_DPI, _COLUMNS = 80, 4
_HOUR, _MINUTE = 3600.0, 60.0
# Losses below this many thousandths of a nat are drawn on a linear scale.
_LINEAR_LOSS = 0.1


def draw_scenario(path: Path, scenario: str, runs: Mapping[str, Finished]) -> None:
    """Draw load, budgets, queue and attainment of `runs`, by law, over the time of the scenario."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 7.2), layout="constrained")
        load, prefill, decode, queue, kept = figure.subplots(5, 1, sharex=True)
        shown = [law for law in (FULL, ORACLE, OURS) if law in runs]
        unit, name = _unit(next(iter(runs.values())).timeline)
        for law in shown:
            line = runs[law].timeline
            seconds = [one / unit for one in line.seconds]
            style: dict[str, Any] = {"color": _COLOURS[law], "linewidth": 1.2, "label": law}
            prefill.step(seconds, line.prefill_budget, where="mid", **style)
            decode.step(seconds, line.decode_budget, where="mid", **style)
            calm: dict[str, Any] = {**style, "linestyle": ":", "label": f"{law}, calm steps"}
            if line.calm_prefill_budget != line.prefill_budget:
                prefill.step(seconds, line.calm_prefill_budget, where="mid", **calm)
            if line.calm_decode_budget != line.decode_budget:
                decode.step(seconds, line.calm_decode_budget, where="mid", **calm)
            queue.plot(seconds, line.queue_requests, **style)
            ratios = [math.nan if one is None else 100 * one for one in line.attainment_ratio]
            kept.plot(seconds, ratios, **style)
        line = next(iter(runs.values())).timeline
        load.plot([one / unit for one in line.seconds], line.arrivals_per_second,
                  color=_LOAD_COLOUR, linewidth=1.0)  # fmt: skip
        queue.set_yscale("symlog", linthresh=1)
        labels = ("requests/s", "prefill budget", "decode budget", "queue", "within SLO, %")
        for axes, label in zip((load, prefill, decode, queue, kept), labels, strict=True):
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        for axes in (prefill, decode):
            axes.legend(loc="lower right", ncols=4)
        load.set_title(f"{scenario}, seed {next(iter(runs.values())).cell.seed}")
        kept.set_xlabel(name)
        figure.savefig(path, dpi=_DPI)


def draw_overview(path: Path, found: Sequence[Verdict]) -> None:
    """Draw attainment against predicted loss of every law, a panel for each scenario."""
    rows = math.ceil(len(found) / _COLUMNS)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12.0, 2.7 * rows), layout="constrained")
        panels = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
        for axes, verdict in zip(panels, found, strict=False):
            _draw_laws(axes, verdict)
        for axes in panels[len(found) :]:
            axes.set_visible(False)
        figure.supxlabel("predicted loss, thousandths of a nat per token")
        figure.supylabel("requests within both SLOs, %")
        figure.savefig(path, dpi=_DPI)


def _draw_laws(axes: Axes, verdict: Verdict) -> None:
    for law, mean in verdict.means.items():
        colour = _COLOURS.get(law, _RIVAL_COLOUR)
        at = (1000 * mean.loss, 100 * mean.attainment_ratio)
        axes.plot(*at, "o", color=colour, markersize=7 if law == OURS else 5)
        axes.annotate(law, at, xytext=(3, 3), textcoords="offset points", fontsize=6)
    axes.set_title(verdict.scenario if verdict.feasible else f"{verdict.scenario} (infeasible)")
    axes.set_xscale("symlog", linthresh=_LINEAR_LOSS)
    axes.set_xlim(left=-0.02)


def _unit(line: Timeline) -> tuple[float, str]:
    long = line.seconds[-1] > 3 * _HOUR
    return (_HOUR, "hours") if long else (_MINUTE, "minutes")
