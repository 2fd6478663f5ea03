"""Write the Grafana dashboard: run `python deploy/grafana/dashboard.py` after changing its rows.

The JSON beside it is what Grafana imports and what the Helm chart ships; a test compares them.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

from dashboard_rows import ROWS
from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from panel_spec import PanelSpec, RowSpec

DASHBOARD_PATH = Path(__file__).with_name("sglang-alloc.json")
DATA_SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
PANEL_HEIGHT = 8


def build_dashboard(rows: tuple[RowSpec, ...] = ROWS) -> model.Dashboard:
    """Return the dashboard model with one Grafana row per RowSpec."""
    board = (
        dashboard.Dashboard("sglang-alloc")
        .uid("sglang-alloc")
        .description("How much quality sglang-alloc trades for latency, and why.")
        .tags(["sglang", "sglang-alloc"])
        .timezone("browser")
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(_label_variable("job", "Job", '{__name__=~"sglang_alloc_.+"}'))
        .with_variable(
            _label_variable("instance", "Instance", '{__name__=~"sglang_alloc_.+", job=~"$job"}')
        )
    )
    panel_ids = count(1)  # Grafana wants them unique, and above zero
    for row in rows:
        board = board.with_row(dashboard.Row(row.title).id(next(panel_ids)))
        for panel in row.panels:
            board = board.with_panel(_graph(panel).id(next(panel_ids)))
    return board.build()


def dashboard_json(board: model.Dashboard) -> str:
    """Return the text of the committed file: stable, indented, newline at the end."""
    return str(JSONEncoder(sort_keys=True, indent=2).encode(board)) + "\n"


def _label_variable(label: str, title: str, selector: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(label)
        .label(title)
        .datasource(DATA_SOURCE)
        .query(f"label_values({selector}, {label})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )


def _graph(spec: PanelSpec) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(spec.title)
        .description(spec.description)
        .datasource(DATA_SOURCE)
        .unit(spec.unit)
        .span(spec.width)
        .height(PANEL_HEIGHT)
        .fill_opacity(5)
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
    )
    if spec.stepped:
        panel = panel.line_interpolation(common.LineInterpolation.STEP_AFTER)
    if spec.unit == "percentunit":
        panel = panel.min(0)
    for letter, query in zip("ABCDEFGH", spec.queries, strict=False):
        panel = panel.with_target(
            prometheus.Dataquery()
            .expr(query.expression)
            .legend_format(query.legend)
            .range()
            .ref_id(letter)
        )
    return panel


def main() -> None:
    """Write the JSON file."""
    DASHBOARD_PATH.write_text(dashboard_json(build_dashboard()), encoding="utf-8")


if __name__ == "__main__":
    main()
