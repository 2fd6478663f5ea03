"""The committed monitoring files, read as data."""

from __future__ import annotations

from typing import Any

import yaml
from chart_render import REPOSITORY

RULES_FOLDER = REPOSITORY / "deploy" / "prometheus"
RULE_FILES = sorted(RULES_FOLDER.glob("*.rules.yaml"))
DASHBOARD = REPOSITORY / "deploy" / "grafana" / "sglang-alloc.json"
RUNBOOK = REPOSITORY / "docs" / "runbook.md"

Rule = dict[str, Any]


def rules() -> list[Rule]:
    """Return every recording rule and alert of deploy/prometheus."""
    return [
        rule
        for path in RULE_FILES
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]


def alerts() -> list[Rule]:
    """Return the alerts among them."""
    return [rule for rule in rules() if "alert" in rule]
