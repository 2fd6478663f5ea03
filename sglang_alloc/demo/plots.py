"""Demo, step 5: the plots of the report, as SVG text to be inlined in a page."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from sglang_alloc.allocation_mode import Phase
from sglang_alloc.demo.load_plan import Slo
from sglang_alloc.demo.observation import RunRecord
from sglang_alloc.demo.served import budget_timeline, mean_budget_by_second

FULL_COLOUR, CONTROLLED_COLOUR = "#8a8f98", "#0b6e69"
DECODE_COLOUR, SLO_COLOUR, BURST_COLOUR = "#d1812f", "#b3261e", "#f3ead7"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a6",
    "axes.labelcolor": "#3c4043",
    "xtick.color": "#3c4043",
    "ytick.color": "#3c4043",
    "axes.grid": True,
    "grid.color": "#eceef1",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def timeline_svg(full: RunRecord, controlled: RunRecord, slo: Slo, full_budget: int) -> str:
    """Return budgets, queue and TTFT per request over the time of the trace."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "timeline"}):
        figure = Figure(figsize=(10.4, 9.0), layout="constrained")
        prefill, decode, queue, ttft = figure.subplots(
            4, 1, sharex=True, height_ratios=(0.8, 0.8, 0.8, 1.5)
        )
        end = max(full.seconds, controlled.seconds)
        _draw_budgets(prefill, "prefill", controlled, full_budget, end)
        _draw_budgets(decode, "decode", controlled, full_budget, end)
        _draw_queue(queue, full, controlled)
        _draw_ttft(ttft, full, controlled, slo)
        for axes in (prefill, decode, queue, ttft):
            _shade_burst(axes, controlled)
        ttft.set_xlim(0, end)
        ttft.set_xlabel("seconds after the start of the trace")
        return _svg(figure)


def distribution_svg(full: RunRecord, controlled: RunRecord, slo: Slo) -> str:
    """Return the distributions of TTFT and of inter-token latency, with the SLOs."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "distribution"}):
        figure = Figure(figsize=(10.4, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for run, colour, name in _named(full, controlled):
            ttfts = [r.ttft_seconds for r in run.requests if r.ttft_seconds is not None]
            gaps_ms = [1000 * gap for r in run.requests for gap in r.inter_token_seconds]
            _draw_share(left, ttfts, colour, name)
            _draw_share(right, gaps_ms, colour, name)
        _mark_slo(left, slo.ttft_seconds, "s", "time to first token, seconds")
        _mark_slo(right, 1000 * slo.itl_seconds, "ms", "inter-token latency, milliseconds")
        left.set_ylabel("share at or below")
        left.legend(loc="upper left")
        return _svg(figure)


def _named(full: RunRecord, controlled: RunRecord) -> list[tuple[RunRecord, str, str]]:
    return [
        (full, FULL_COLOUR, "full quality"),
        (controlled, CONTROLLED_COLOUR, "controlled"),
    ]


def _draw_budgets(axes: Axes, phase: Phase, run: RunRecord, full_budget: int, end: float) -> None:
    colour = {"prefill": CONTROLLED_COLOUR, "decode": DECODE_COLOUR}[phase]
    timeline = budget_timeline(run, phase, end)
    seconds = [entry.second for entry in timeline]
    busy, calm = ([entry.busy for entry in timeline], [entry.calm for entry in timeline])
    axes.fill_between(seconds, busy, calm, step="post", color=colour, alpha=0.12, linewidth=0)
    axes.step(seconds, calm, where="post", color=colour, lw=1.2, ls=(0, (1, 1)), label="calm steps")
    axes.step(seconds, busy, where="post", color=colour, lw=1.2, label="busy steps")
    served = mean_budget_by_second(run, phase)
    axes.plot(
        [second for second, _ in served],
        [budget for _, budget in served],
        color=colour,
        lw=2.6,
        alpha=0.9,
        label="mean of the tokens served",
    )
    axes.axhline(full_budget, color=FULL_COLOUR, lw=1, ls=(0, (4, 3)), label="full quality")
    axes.set_ylim(0, full_budget * 1.35)
    axes.set_ylabel(f"{phase} budget\nactivations\nper token")
    axes.legend(loc="upper right", ncols=4)


def _draw_queue(axes: Axes, full: RunRecord, controlled: RunRecord) -> None:
    for run, colour, name in _named(full, controlled):
        seconds = [sample.second for sample in run.gauges]
        axes.plot(seconds, [s.queue_requests for s in run.gauges], color=colour, label=name, lw=1.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("queue\nrequests waiting")
    axes.legend(loc="upper right", ncols=2)


def _draw_ttft(axes: Axes, full: RunRecord, controlled: RunRecord, slo: Slo) -> None:
    for run, colour, name in _named(full, controlled):
        dots = [(r.due_second, r.ttft_seconds) for r in run.requests if r.ttft_seconds is not None]
        axes.scatter(
            [due_second for due_second, _ in dots],
            [ttft_seconds for _, ttft_seconds in dots],
            s=14,
            color=colour,
            alpha=0.75,
            linewidths=0,
            label=name,
        )
    axes.axhline(slo.ttft_seconds, color=SLO_COLOUR, lw=1.2)
    axes.annotate(
        f"SLO {slo.ttft_seconds:g} s",
        (0.0, slo.ttft_seconds),  # the legend is at the other end, and may be as high
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        ha="left",
        color=SLO_COLOUR,
    )
    axes.set_yscale("log")
    _label_1_2_5(axes.yaxis)
    axes.set_ylabel("time to first token\nseconds, one dot per request")
    axes.legend(loc="upper right", ncols=2)


def _shade_burst(axes: Axes, run: RunRecord) -> None:
    for name, start, end in run.trace.phase_bounds():
        if name == "burst":
            axes.axvspan(start, end, color=BURST_COLOUR, zorder=-2, linewidth=0)
            axes.annotate(
                name,
                ((start + end) / 2, 0.03),
                xycoords=("data", "axes fraction"),
                ha="center",
                color="#8a6d3b",
            )


def _draw_share(axes: Axes, values: list[float], colour: str, name: str) -> None:
    if values:
        axes.ecdf(values, color=colour, label=name, lw=1.8)
    else:  # no request was answered: an empty curve, still named in the legend
        axes.plot([], [], color=colour, label=name)


def _mark_slo(axes: Axes, value: float, unit: str, label: str) -> None:
    axes.axvline(value, color=SLO_COLOUR, lw=1.2)
    axes.annotate(
        f"SLO {value:g} {unit}",
        (value, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        color=SLO_COLOUR,
    )
    axes.set_xscale("log")
    _label_1_2_5(axes.xaxis)
    axes.set_xlabel(label)


def _label_1_2_5(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 in each decade, in plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _svg(figure: Figure) -> str:
    """Return the figure as an <svg> element, without the XML prologue that HTML cannot hold."""
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
