"""Offline story, judging: quality against use, drawn as PNG (needs the `report` extra)."""

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.evaluation.decode_union import PLAIN_RULE, text_name, union_name
from sglang_alloc.evaluation.findings import losses_above_full
from sglang_alloc.evaluation.points import Point, Points
from sglang_alloc.evaluation.rules import BASELINES, DEFAULT_RULE, RULE_NAMES
from sglang_alloc.evaluation.summary_csv import measure_interval
from sglang_alloc.evaluation.text_measures import BATCH_SIZES

DOTS_PER_INCH = 90
OURS, GREY = "#0b6e69", "#9aa0a6"
COLOURS = ("#d1812f", "#5b6abf", "#b3261e", "#7a5195", "#4a90d9", "#8a6d3b", "#c2578f", "#6b8e23",
           "#222222")  # fmt: skip


def plot_quality(tables: BudgetTables, points: Points) -> bytes:
    """Loss above full, KL and two kinds of agreement against measured mean k, rule by rule."""
    figure, panels = _figure(2, 2, (11.5, 8))
    panels_of = zip(panels, ("nll_above_full", "kl", "agreement", "continuation"), strict=True)
    labels = {
        "nll_above_full": "loss above full (nats per byte)",
        "kl": "KL from full (nats per byte)",
        "agreement": "next byte as full's (share)",
        "continuation": "greedy continuation as full's (share)",
    }
    for axes, measure in panels_of:
        for rule, colour in _lines():
            _curve(axes, points, rule, measure, colour)
        if measure in {"nll_above_full", "kl"}:
            _log_scale(axes)
        axes.set(xlabel="measured activations per token and layer", ylabel=labels[measure])
    panels[0].legend(fontsize=8, ncols=2)
    figure.suptitle(f"{tables.model_id}: quality against measured mean k, 95% intervals")
    return _png(figure)


def plot_pareto(tables: BudgetTables, points: Points) -> bytes:
    """Every measured rule at every budget as one cloud, and the front that none of them passes."""
    figure, (axes,) = _figure(1, 1, (8, 5.2))
    grid = [p for p in points.values() if p.rule in RULE_NAMES]
    places = sorted((p.mean_k, float(losses_above_full(points, p).mean()), p.rule) for p in grid)
    kinds = ((DEFAULT_RULE, OURS, 55), (None, GREY, 22))
    for rule, colour, size in kinds:
        chosen = [(x, y) for x, y, name in places if (name == DEFAULT_RULE) == (rule is not None)]
        label = "default mode" if rule else "every other rule and correction"
        means = [x for x, _ in chosen]
        losses = [y for _, y in chosen]
        axes.scatter(means, losses, color=colour, s=size, label=label, zorder=3)
    front, least = [], float("inf")
    for x, y, name in places:
        if y < least:
            least = y
            front.append((x, y, name))
    axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color="#3c4043", lw=1, zorder=2,
              label="front")  # fmt: skip
    for x, y, name in front:
        if name != DEFAULT_RULE:
            axes.annotate(name, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
    _log_scale(axes)
    axes.set(
        xlabel="measured activations per token and layer",
        ylabel="loss above full (nats per byte)",
        title=f"{tables.model_id}: Pareto front",
    )
    axes.legend()  # fmt: skip
    return _png(figure)


def plot_union(points: Points) -> bytes:
    """Loss against distinct experts per decode step, for each decode batch."""
    figure, panels = _figure(1, len(BATCH_SIZES), (11.5, 3.8))
    for axes, batch in zip(panels, BATCH_SIZES, strict=True):
        for rule, colour, label in (
            (text_name(PLAIN_RULE), COLOURS[0], "uniform k"),
            (text_name(DEFAULT_RULE), OURS, "threshold"),
            (union_name(batch), COLOURS[1], "union"),
        ):
            rows = sorted(
                (p.distinct_experts[batch], float(losses_above_full(points, p).mean()))
                for p in points.values()
                if p.rule == rule
            )
            axes.plot(*zip(*rows, strict=True), marker=".", color=colour, label=label)
        _log_scale(axes)
        axes.set(xlabel="distinct experts per layer and step", title=f"decode batch of {batch}")
    panels[0].set_ylabel("loss above full (nats per byte)")
    panels[0].legend(fontsize=8)
    return _png(figure)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DOTS_PER_INCH)
    return image.getvalue()


def _log_scale(axes: Axes) -> None:
    """Make losses logarithmic, unless noise has made gains of all of them."""
    if axes.dataLim.y1 > 0:
        axes.set_yscale("log")


def _lines() -> list[tuple[str, str]]:
    return [(DEFAULT_RULE, OURS), *zip(BASELINES, COLOURS, strict=True)]


def _curve(axes: Axes, points: Points, rule: str, measure: str, colour: str) -> None:
    rows: list[Point] = sorted((p for p in points.values() if p.rule == rule),
                               key=lambda p: p.mean_k)  # fmt: skip
    found = [(point.mean_k, measure_interval(points, point, measure)) for point in rows]
    measured = [(mean_k, interval) for mean_k, interval in found if interval is not None]
    xs, intervals = [mean_k for mean_k, _ in measured], [interval for _, interval in measured]
    if not intervals:
        return
    ours = rule == DEFAULT_RULE
    axes.plot(xs, [i.mean for i in intervals], marker=".", color=colour, label=rule,
              lw=2.4 if ours else 1.1, zorder=4 if ours else 2)  # fmt: skip
    axes.fill_between(xs, [i.low for i in intervals], [i.high for i in intervals],
                      color=colour, alpha=0.18 if ours else 0.06, lw=0)  # fmt: skip
