"""Bench: medians, ratios and their spread over the rounds; the CSV and the Markdown table."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    """One budget and stock SGLang (None: not served), timed one after the other in a round."""

    case: str
    budget: int
    phase: str
    concurrency: int
    stock_seconds: float | None
    seconds: float


class Row(NamedTuple):
    """One case over all rounds; a quartile pair is (25 %, 75 %) and holds half of the rounds.

    What is of stock is None where no stock server was beside it.
    """

    phase: str
    concurrency: int
    case: str
    budget: int
    activations_per_token: float | None
    rounds: int
    median_ms: float
    low_ms: float
    high_ms: float
    stock_median_ms: float | None
    ratio_to_stock: float | None
    ratio_low: float | None
    ratio_high: float | None


def summarise(pairs: Sequence[Pair], activations: Mapping[tuple[str, str], float]) -> list[Row]:
    """Return a row per (phase, concurrency, case), in the order in which they first occur.

    The ratio is the median of the rounds' own ratios, so what slows a whole round cancels.
    `activations` maps (case, phase) to the measured mean of activations per token.
    """
    groups: dict[tuple[str, int, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[(pair.phase, pair.concurrency, pair.case)].append(pair)
    return [
        _row(group, activations.get((case, phase))) for (phase, _, case), group in groups.items()
    ]


def _row(group: Sequence[Pair], activations_per_token: float | None) -> Row:
    times = [1000 * pair.seconds for pair in group]
    low_ms, high_ms = quartiles(times)
    return Row(
        group[0].phase,
        group[0].concurrency,
        group[0].case,
        group[0].budget,
        activations_per_token,
        len(group),
        statistics.median(times),
        low_ms,
        high_ms,
        *_beside_stock(group),
    )


def _beside_stock(group: Sequence[Pair]) -> tuple[float | None, ...]:
    """Return stock's median in ms, and the median and quartiles of the ratios to it."""
    both = [(pair.seconds, pair.stock_seconds) for pair in group if pair.stock_seconds is not None]
    if not both:
        return (None, None, None, None)
    ratios = [seconds / stock for seconds, stock in both]
    stock_ms = statistics.median(1000 * stock for _, stock in both)
    return (stock_ms, statistics.median(ratios), *quartiles(ratios))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the 25 % and 75 % points, linear between measured values."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def write_csv(path: Path, rows: Sequence[Row], facts: Mapping[str, object]) -> None:
    """Write one line per row, each with the facts that the figures depend on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Row._fields, *facts])
        for row in rows:
            writer.writerow([*(_cell(value) for value in row), *facts.values()])


def markdown(rows: Sequence[Row]) -> str:
    """Return a table per phase: a line per budget, a column per concurrency."""
    return "\n\n".join(_phase_table(rows, phase) for phase in ("decode", "prefill"))


def _phase_table(rows: Sequence[Row], phase: str) -> str:
    mine = [row for row in rows if row.phase == phase]
    concurrencies = sorted({row.concurrency for row in mine})
    title = "ms per decode step" if phase == "decode" else "ms until the batch's first tokens"
    heads = [f"concurrency {concurrency}" for concurrency in concurrencies]
    lines = [
        f"| {phase}: {title} | activations per token | {' | '.join(heads)} |",
        "|---" * (2 + len(heads)) + "|",
    ]
    if any(row.stock_median_ms is not None for row in mine):
        lines.append(f"| stock SGLang | | {' | '.join(_stock(mine, c) for c in concurrencies)} |")
    full_ms = {row.concurrency: row.median_ms for row in _of_largest_budget(mine)}
    for case in dict.fromkeys(row.case for row in mine):
        cells = sorted((row for row in mine if row.case == case), key=lambda row: row.concurrency)
        measured = cells[0].activations_per_token
        shown = "" if measured is None else f"{measured:.1f}"
        figures = " | ".join(_figure(row, full_ms[row.concurrency]) for row in cells)
        lines.append(f"| {case} (budget {cells[0].budget}) | {shown} | {figures} |")
    return "\n".join(lines)


def _of_largest_budget(rows: Sequence[Row]) -> list[Row]:
    largest = max(row.budget for row in rows)
    return [row for row in rows if row.budget == largest]


def _stock(rows: Sequence[Row], concurrency: int) -> str:
    mine = [row.stock_median_ms for row in rows if row.concurrency == concurrency]
    return f"{statistics.median(ms for ms in mine if ms is not None):.1f}"


def _figure(row: Row, full_ms: float) -> str:
    """Return the median and its ratio to stock with the quartiles, or else to full budget."""
    if row.ratio_to_stock is None:
        return f"{row.median_ms:.1f} = {row.median_ms / full_ms:.2f}x full"
    spread = f"{row.ratio_low:.2f}-{row.ratio_high:.2f}"
    return f"{row.median_ms:.1f} = {row.ratio_to_stock:.2f}x ({spread})"


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else value
