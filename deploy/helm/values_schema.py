"""Copy the controller's own JSON schema into the chart's: run it after changing a setting.

`python deploy/helm/values_schema.py` rewrites `$defs` of values.schema.json, so that helm refuses a
wrong `controller.config` with the controller's own bounds. Everything else there is kept by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_alloc_controller.settings import json_schema

SCHEMA_PATH = Path(__file__).with_name("sglang-alloc") / "values.schema.json"
LINE_WIDTH = 100
# Known only to the chart, which writes them into the configuration itself.
CHART_OWNED = ("table", "http")


def updated_schema(text: str) -> str:
    """Return the chart's schema `text` with the controller's part brought up to date."""
    schema: dict[str, Any] = json.loads(text)
    settings: dict[str, Any] = json.loads(json_schema())
    sections = settings.pop("$defs")
    del sections["HttpSettings"]
    for key in CHART_OWNED:
        del settings["properties"][key]
    settings["required"] = [k for k in settings["required"] if k not in CHART_OWNED]
    # A null in the values deletes the key before the schema sees it; the chart puts it back.
    sections["SloSettings"]["required"] = []
    schema["$defs"] = {"ControllerConfig": settings, **sections}
    return _compact(schema) + "\n"


def _compact(value: Any, indent: int = 0) -> str:
    """Return JSON in which whatever fits stands on one line: a quarter of the lines to read."""
    line = json.dumps(value)
    if indent + len(line) <= LINE_WIDTH or not isinstance(value, dict | list) or not value:
        return line
    margin = " " * (indent + 2)
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {_compact(v, indent + 2)}" for k, v in value.items()]
    else:
        items = [_compact(v, indent + 2) for v in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{margin}" + f",\n{margin}".join(items) + f"\n{' ' * indent}{closing}"


def main() -> None:
    """Rewrite the file."""
    SCHEMA_PATH.write_text(updated_schema(SCHEMA_PATH.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
