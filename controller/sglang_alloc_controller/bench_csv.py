"""Control story, before the first step: read a server's step times from the CSV of its bench."""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.step_times import PhaseTimes, StepTimes

COLUMNS = ("phase", "concurrency", "budget", "median_ms")
# Shipped with the package: the reference model on two CPU cores, from `make bench`.
DEFAULT_BENCH = Path(__file__).parent / "simulator" / "plants" / "cpu.csv"
_Row = dict[str, str]


def read_step_times(path: Path) -> StepTimes:
    """Fit step times to a bench CSV with the columns of `COLUMNS`.

    A prefill row of concurrency c counts as a step of c * `prefill_prompt_tokens` tokens. Where
    `stock_median_ms` and `ratio_to_stock` are present the full step time is the median of stock's
    and the others follow from the ratios, which were measured side by side.

    Raises:
        ConfigurationError: the file cannot be read, lacks a column, or its grid has holes.
    """
    rows = _read(path)
    return StepTimes(
        prefill=_phase_times(path, [row for row in rows if row["phase"] == "prefill"], "prefill"),
        decode=_phase_times(path, [row for row in rows if row["phase"] == "decode"], "decode"),
        source=path.name,
    )


def _read(path: Path) -> list[_Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"The bench {path} cannot be read: {error}.") from error
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise ConfigurationError(
            f"The bench {path} should have the columns {', '.join(COLUMNS)} and lacks "
            f"{', '.join(missing)}. Make it with `make bench`."
        )
    return rows


def _phase_times(path: Path, rows: list[_Row], phase: str) -> PhaseTimes:
    cells: dict[float, dict[int, float]] = defaultdict(dict)
    try:
        for size, budget, seconds in _cells(rows):
            cells[size][budget] = seconds
    except (KeyError, ValueError) as error:
        raise ConfigurationError(f"The bench {path} has a row that is no result: {error}.") from (
            error
        )
    budgets = sorted({budget for row in cells.values() for budget in row})
    holes = [(size, budget) for size in cells for budget in budgets if budget not in cells[size]]
    if not budgets or holes:
        raise ConfigurationError(
            f"The bench {path} should time every budget at every {phase} size; missing (size, "
            f"budget): {holes or 'all'}. Run it again to its end."
        )
    sizes = sorted(cells)
    seconds_by_size = tuple(tuple(cells[size][one] for one in budgets) for size in sizes)
    return PhaseTimes(tuple(sizes), tuple(budgets), seconds_by_size)


def _cells(rows: list[_Row]) -> list[tuple[float, int, float]]:
    """Return (size, budget, seconds) of every row."""
    by_size: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        by_size[int(row["concurrency"])].append(row)
    cells = []
    for concurrency, same in by_size.items():
        tokens = float(same[0].get("prefill_prompt_tokens") or 1)
        size = concurrency * tokens if same[0]["phase"] == "prefill" else float(concurrency)
        full = max(same, key=lambda row: int(row["budget"]))
        paired = bool(full.get("ratio_to_stock") and full.get("stock_median_ms"))
        stock_ms = statistics.median(float(row["stock_median_ms"]) for row in same) if paired else 0
        for row in same:
            if paired:
                ratio = float(row["ratio_to_stock"]) / float(full["ratio_to_stock"])
                cells.append((size, int(row["budget"]), stock_ms * ratio / 1000))
            else:
                cells.append((size, int(row["budget"]), float(row["median_ms"]) / 1000))
    return cells
