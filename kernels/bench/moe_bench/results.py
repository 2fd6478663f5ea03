"""Bench, what is left of a run: a CSV that grows unit by unit, so that a run can go on later."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_bench.measure import Row

# A unit that has rows with these values is done; another commit or machine measures anew.
SAME_RUN = ("device", "driver", "torch", "sglang", "commit")
CASE = ("kind", "shape", "num_tokens", "mode", "budget")
STOCK = "-"  # the mode of a row of stock SGLang


class Results:
    """Rows of this and earlier runs in one file."""

    def __init__(self, path: Path, machine: Mapping[str, str]) -> None:
        self._path = path
        self._machine = dict(machine)
        rows = [row for row in _read(path) if self._is_same_run(row)]
        self._done = {tuple(row[name] for name in CASE) for row in rows}

    def has(
        self, kind: str, shape: str, num_tokens: int, mode: str = STOCK, budget: str = "full"
    ) -> bool:
        """Return whether this was measured on this machine at this commit."""
        return (kind, shape, str(num_tokens), mode, budget) in self._done

    def add(self, rows: Sequence[Row], ceilings: Mapping[str, str]) -> None:
        """Append the rows of a unit."""
        columns = [*Row._fields, *ceilings, *self._machine]
        is_new = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(columns)
            for row in rows:
                cells = [_cell(value) for value in row]
                writer.writerow([*cells, *ceilings.values(), *self._machine.values()])
        self._done |= {tuple(str(getattr(row, name)) for name in CASE) for row in rows}

    def _is_same_run(self, row: Mapping[str, str]) -> bool:
        return all(row.get(name) == self._machine[name] for name in SAME_RUN)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else value
