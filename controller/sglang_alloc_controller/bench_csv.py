"""Control story, before the first step: read a server's step times from the CSV of its bench."""

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path

from sglang_alloc.errors import ConfigurationError, reason_of
from sglang_alloc_controller.step_times import PhaseTimes, StepTimes

COLUMNS = ("phase", "concurrency", "budget", "median_ms")
UNNAMED_MODE = "(not named)"  # of a bench without a column `mode`
# Shipped with the package: the reference model on two CPU cores, from `make bench`.
DEFAULT_BENCH = Path(__file__).parent / "simulator" / "plants" / "cpu.csv"
_Row = dict[str, str]


def modes_measured(path: Path) -> list[str]:
    """Return the modes in the bench's column `mode`, in order; raises as `read_step_times` does."""
    return list(dict.fromkeys(row.get("mode") or UNNAMED_MODE for row in _read(path)))


def read_step_times(path: Path, mode: str | None = None) -> StepTimes:
    """Fit step times to a bench CSV with the columns of `COLUMNS`.

    A file that holds several modes is read for `mode`.

    A prefill row of concurrency c counts as a step of c * `prefill_prompt_tokens` tokens. Where
    `stock_median_ms` and `ratio_to_stock` are present the full step time is the median of stock's
    and the others follow from the ratios, which were measured side by side.

    Raises:
        ConfigurationError: the file cannot be read, lacks a column, its grid has holes, a size or a
            time is not above zero, or it holds several modes and none was asked for.
    """
    rows = _of_mode(path, _read(path), mode)
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
        reason = reason_of(error)
        raise ConfigurationError(
            f"The bench {path} cannot be read: {reason}. Give the CSV that `sglang-alloc bench` or "
            "`sglang-alloc-controller advise --output` wrote."
        ) from error
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise ConfigurationError(
            f"The bench {path} should have the columns {', '.join(COLUMNS)} and lacks "
            f"{', '.join(missing)}. Make it with `sglang-alloc bench`."
        )
    return rows


def _of_mode(path: Path, rows: list[_Row], mode: str | None) -> list[_Row]:
    found = {row.get("mode") or UNNAMED_MODE for row in rows}
    if mode is None and len(found) > 1:
        raise ConfigurationError(
            f"{path} holds the step times of the modes {', '.join(sorted(found))}, and a server "
            "serves one of them. Make a cost model of that one with `sglang-alloc-controller "
            "advise --mode`."
        )
    if mode is not None and mode not in found:
        raise ConfigurationError(
            f"{path} holds the step times of mode {', '.join(sorted(found))} and not of {mode}."
        )
    return [row for row in rows if mode is None or (row.get("mode") or UNNAMED_MODE) == mode]


def _phase_times(path: Path, rows: list[_Row], phase: str) -> PhaseTimes:
    cells: dict[float, dict[int, float]] = defaultdict(dict)
    try:
        for size, budget, seconds in _cells(rows):
            if not (0 < size < math.inf and 0 < seconds < math.inf):
                raise ValueError(
                    f"a {phase} step of size {size:g} at budget {budget} takes {seconds:g} s, "
                    "where numbers above zero belong"
                )
            cells[size][budget] = seconds
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
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
