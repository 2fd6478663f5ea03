"""Read a dashboard's JSON back: every query of every panel, ready to be run by a Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# What an untouched dashboard sends: every job and instance, and Grafana's own intervals.
DEFAULT_VARIABLES: Mapping[str, str] = {
    "job": ".*",
    "instance": ".*",
    "__rate_interval": "1m",
    "__interval": "15s",
    "__range": "1h",
}
_VARIABLE = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)")


class PanelQuery(NamedTuple):
    """One query as Grafana would send it, with the panel it belongs to."""

    panel: str
    ref_id: str
    expression: str


def panel_queries(
    dashboard: Path, variables: Mapping[str, str] = DEFAULT_VARIABLES
) -> list[PanelQuery]:
    """Return the queries of all panels of `dashboard`, nested rows included, variables filled in.

    Raises ValueError naming panel and variable when a query uses a variable without a value.
    """
    content = json.loads(dashboard.read_text(encoding="utf-8"))
    return [
        PanelQuery(
            panel["title"], target["refId"], _fill(target["expr"], variables, panel["title"])
        )
        for panel in _panels(content)
        for target in panel.get("targets", ())
    ]


def _panels(container: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for panel in container.get("panels", ()):
        yield panel
        yield from _panels(panel)


def _fill(expression: str, variables: Mapping[str, str], panel: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in variables:
            raise ValueError(
                f"panel {panel!r} uses ${name}, which has no value; known: {sorted(variables)}"
            )
        return variables[name]

    return _VARIABLE.sub(value, expression)
