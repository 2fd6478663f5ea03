"""The two operators' pages speak of what exists."""

from __future__ import annotations

import re

import yaml
from chart_render import CHART, REPOSITORY
from prometheus_files import RUNBOOK

from sglang_alloc_controller.law_state import Reason

DEPLOY_PAGE = REPOSITORY / "docs" / "deploy.md"


def test_runbook_explains_every_reason_of_the_controller_and_no_other() -> None:
    table = RUNBOOK.read_text(encoding="utf-8").split("## Reasons")[1]
    first_columns = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    explained = {name for cell in first_columns for name in re.findall(r"`(\w+)`", cell)}
    assert explained == {reason.value for reason in Reason}


def test_links_inside_the_runbook_lead_somewhere() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    headings = {heading.lower() for heading in re.findall(r"^## (\S+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= headings


def test_deploy_page_names_only_files_that_exist() -> None:
    text = DEPLOY_PAGE.read_text(encoding="utf-8")
    for path in re.findall(r"deploy/[\w./*-]*\w", text):
        assert list(REPOSITORY.glob(path)), path


def test_deploy_page_names_only_values_that_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    text = DEPLOY_PAGE.read_text(encoding="utf-8")
    sections = "|".join(values)
    named = re.findall(rf"[`\s]((?:{sections})(?:\.\w+)+)[`=]", text)
    assert len(named) > 10
    for name in named:
        place = values
        for key in name.split("."):
            assert key in place or place == {}, f"{name} is not a value of the chart"
            place = place.get(key, {})
