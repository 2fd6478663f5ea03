"""Offline story, judging: the evaluation as CSV, plots and one page of Markdown tables."""

from pathlib import Path

from sglang_alloc.atomic_file import replace_file
from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.evaluation.decode_union import union_name
from sglang_alloc.evaluation.findings import (
    FULL_RULE,
    baselines,
    best_rival,
    compare,
    measured_losses,
    rank_correlation,
    union_findings,
)
from sglang_alloc.evaluation.intervals import Interval
from sglang_alloc.evaluation.neighbours import STEP_RULES, neighbour_name
from sglang_alloc.evaluation.plots import plot_pareto, plot_quality, plot_union
from sglang_alloc.evaluation.points import Point, Points
from sglang_alloc.evaluation.rules import DEFAULT_RULE, RULE_NAMES, RULES
from sglang_alloc.evaluation.summary_csv import measure_interval, summary_text
from sglang_alloc.evaluation.switching import SWITCH_POSITIONS, switch_name
from sglang_alloc.evaluation.text_measures import BATCH_SIZES

NEAREST = ("Alloc-L + Alloc-T", "Alloc-T", "NAEE skipping", "top-p", "uniform k + gain")


def write_report(folder: Path, tables: BudgetTables, points: Points) -> Path:
    """Write summary.csv, the plots and QUALITY.md into `folder`; return the last one's path.

    Raises:
        ConfigurationError: one of them cannot be written; it then is what it was before.
    """
    files = {
        "summary.csv": summary_text(tables.model_id, points).encode(),
        "quality.png": plot_quality(tables, points),
        "pareto.png": plot_pareto(tables, points),
        **({"union.png": plot_union(points)} if union_findings(points, BATCH_SIZES) else {}),
        "QUALITY.md": report_text(tables, points).encode(),
    }
    for name, content in files.items():
        try:
            replace_file(folder / name, content, mode=0o644)
        except OSError as error:
            raise ConfigurationError(
                f"{folder / name} could not be written: {error.strerror}. The measured points are "
                "kept: run the same command again when that is mended."
            ) from error
    return folder / "QUALITY.md"


def report_text(tables: BudgetTables, points: Points) -> str:
    """The page of tables, of what was measured: a close comparison has losses alone."""
    sections = (
        f"# Quality of {tables.model_id} by rule and budget",
        loss_table(points, tables),
        bar_table(points),
        generation_table(points, tables),
        union_table(points),
        prediction_text(points, tables),
        switching_table(points, tables),
        neighbour_table(points),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def grid_budgets(points: Points) -> list[int]:
    """The budgets at which the default rule was measured in every way."""
    return sorted(budget for rule, budget in points if rule == DEFAULT_RULE)


def loss_table(points: Points, tables: BudgetTables) -> str:
    """NLL above full of every rule, at the mean k that was measured."""
    budgets = grid_budgets(points)
    rows = []
    for rule in _measured_rules(points):
        cells = []
        for budget in budgets:
            point = points[rule, budget]
            interval = measure_interval(points, point, "nll_above_full")
            assert interval is not None
            cells.append(f"{interval.mean:.4f} ({point.mean_k:.2f})")
        rows.append([f"**{rule}**" if rule == DEFAULT_RULE else rule, *cells])
    head = ["rule", *(f"{b}/{tables.budget_max}" for b in budgets)]
    return "## Loss above full, nats per byte (measured mean k)\n\n" + table(head, rows)


def bar_table(points: Points) -> str:
    """The default rule against every baseline, at its own measured mean k."""
    rows = []
    others = [name for name in _measured_rules(points) if name != DEFAULT_RULE]
    if not any(name in baselines() for name in others):
        return ""
    for budget in grid_budgets(points):
        best, any_best = best_rival(points, budget), best_rival(points, budget, others)
        rows.append([
            str(budget), f"{best.mean_k:.3f}", _text(best.default_loss), best.rival,
            f"{best.rival_loss:.4f}", _text(best.difference), _verdict(best.difference),
            any_best.rival, _text(any_best.difference),
        ])  # fmt: skip
    head = [
        "budget",
        "mean k",
        "default",
        "best baseline",
        "its loss",
        "difference",
        "default is",
        "best of all other rules and corrections",
        "difference from it",
    ]
    names = [name for name in others if name in NEAREST]
    every = [
        [str(budget), *(_text(compare(points, budget, name).difference) for name in names)]
        for budget in grid_budgets(points)
    ]
    return (
        "## The default mode against the baselines, at equal measured mean k\n\n"
        + table(head, rows)
        + "\n\nDifference from some of them (default minus baseline, 95% interval):\n\n"
        + table(["budget", *names], every)
    )


def generation_table(points: Points, tables: BudgetTables) -> str:
    """Continuations and exact answers of the rules that matter, by budget."""
    full = points[FULL_RULE, tables.budget_max]
    if "continuation" not in full.samples:
        return ""
    measures = [name for name in full.samples if name not in {"nll", "kl"}]
    rows = [["full", str(tables.budget_max), *(_share(points, full, m) for m in measures)]]
    for budget in grid_budgets(points):
        for rule in RULES:
            point = points.get((rule, budget))
            if point is None or "continuation" not in point.samples:
                continue
            rows.append([rule, str(budget), *(_share(points, point, m) for m in measures)])
    return (
        "## Generation: agreement with full, and exact answers (95% interval)\n\n"
        "`continuation` is the share of a greedy continuation before its first different byte; "
        "the tasks after it count answers that are right to the last byte.\n\n"
        + table(["rule", "budget", *measures], rows)
    )


def union_table(points: Points) -> str:
    """Mode `union` against plain k at equal distinct experts per decode step."""
    rows = [
        [
            union_name(f.batch), str(f.budget), f"{f.distinct_experts:.1f}", _text(f.union_loss),
            f"{f.plain_loss:.4f}", _text(f.difference), f"{f.ratio:.2f}",
        ]
        for f in union_findings(points, BATCH_SIZES)
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["decode batch", "budget", "distinct experts", "union's loss", "plain k's loss",
            "difference", "ratio"]  # fmt: skip
    return "## Decode at equal distinct experts per layer and step\n\n" + table(head, rows)


def prediction_text(points: Points, tables: BudgetTables) -> str:
    """How well the tables' predicted losses order and size the measured ones."""
    lines = []
    for rule, predicted in (
        (DEFAULT_RULE, tables.threshold_predicted_loss),
        ("layer", tables.predicted_loss),
    ):
        measured = measured_losses(points, rule)
        if not measured:
            return ""
        assert predicted is not None
        expected = [float(predicted[budget - tables.budget_min]) for budget in measured]
        pairs = list(zip(measured, expected, strict=True))
        rank = rank_correlation(expected, list(measured.values()))
        some = ", ".join(
            f"{budget}: {want:.4f} / {measured[budget]:.4f}" for budget, want in pairs[::3]
        )
        lines.append(
            f"- `{rule}`: rank correlation {rank:.3f} over {len(pairs)} budgets "
            f"(predicted / measured at {some})."
        )
    return "## Predicted and measured loss\n\n" + "\n".join(lines)


def switching_table(points: Points, tables: BudgetTables) -> str:
    """Loss of what follows a change of budget, above the full model's on the same bytes."""
    budgets = sorted({budget for rule, budget in points if rule.startswith("switch from")})
    full = tables.budget_max
    if (
        sum(rule.startswith("switch from") for rule, _ in points)
        < len(budgets) ** 2 * len(SWITCH_POSITIONS)
        or not budgets
    ):
        return ""
    rows = []
    for before in budgets:
        for after in budgets:
            cells = []
            for at in SWITCH_POSITIONS:
                point = points[switch_name(before, at), after].samples
                stay = points[switch_name(full, at), full].samples
                cells.append(
                    f"{_mean_difference(point['soon'], stay['soon']):.4f} / "
                    f"{_mean_difference(point['rest'], stay['rest']):.4f}"
                )
            rows.append([f"{before} → {after}", *cells])
    return (
        "## A change of budget in mid-sequence\n\n"
        "Loss above full, of the 32 bytes behind the change / of all the rest of 512 bytes, by "
        "the place of the change.\n\n"
        + table(["budgets", *(f"at byte {at}" for at in SWITCH_POSITIONS)], rows)
    )


def neighbour_table(points: Points) -> str:
    """How much of a request's output its batch neighbours decide."""
    rows = []
    for rule in (FULL_RULE, *STEP_RULES):
        found = (p for p in points.values() if p.rule == neighbour_name(rule))
        for point in sorted(found, key=lambda p: p.budget):
            means = {name: sum(v) / len(v) for name, v in point.samples.items()}
            rows.append([
                rule, str(point.budget), f"{means['kl']:.5f}", f"{means['changed']:.2%}",
                f"{max(point.samples['logit']):.3g}", f"{means['unlike']:.1%}",
            ])  # fmt: skip
    if not rows:
        return ""
    head = ["rule", "budget", "KL, nats", "other likeliest byte", "largest logit difference",
            "continuation that differs"]  # fmt: skip
    return "## The same request among other neighbours (decode batch of 8)\n\n" + table(head, rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measured_rules(points: Points) -> list[str]:
    budgets = grid_budgets(points)
    order = (DEFAULT_RULE, *(name for name in RULE_NAMES if name != DEFAULT_RULE))
    return [rule for rule in order if all((rule, budget) in points for budget in budgets)]


def _share(points: Points, point: Point, measure: str) -> str:
    interval = measure_interval(points, point, measure)
    assert interval is not None
    return f"{interval.mean:.3f} ({interval.low:.2f}..{interval.high:.2f})"


def _text(interval: Interval) -> str:
    return f"{interval.mean:+.4f} ({interval.low:+.4f}..{interval.high:+.4f})"


def _verdict(difference: Interval) -> str:
    if not difference.excludes_zero:
        return "as good"
    return "better" if difference.mean < 0 else "worse"


def _mean_difference(first: list[float], second: list[float]) -> float:
    return sum(first) / len(first) - sum(second) / len(second)
