"""What a dashboard panel says, as data: dashboard_rows lists them, dashboard draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

# Grafana's names: seconds, a ratio shown in percent, a plain number.
Unit = Literal["s", "percentunit", "short"]


class Query(NamedTuple):
    """One PromQL expression, with $job and $instance as variables, and its legend template."""

    expression: str
    legend: str


@dataclass(frozen=True)
class PanelSpec:
    """One graph. `unit` is Grafana's name of the unit; `stepped` draws values that jump."""

    title: str
    description: str
    unit: Unit
    queries: tuple[Query, ...]
    stepped: bool = False
    width: int = 8


class RowSpec(NamedTuple):
    """A titled row of panels."""

    title: str
    panels: tuple[PanelSpec, ...]
