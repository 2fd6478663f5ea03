"""Prometheus accepts the rules, and every alert fires when it should, stays silent otherwise,
and leads to a section of the runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_render import HERE, only, render
from prometheus_files import RULE_FILES, RULES_FOLDER, RUNBOOK, Rule, alerts, rules
from promql_names import metric_patterns

UNIT_TESTS = sorted((HERE / "rules").glob("*.test.yaml"))
ALERTS = [rule["alert"] for rule in alerts()]


def _promtool(binary: str, *arguments: str) -> str:
    result = subprocess.run([binary, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _alert_expectations() -> list[dict[str, Any]]:
    return [
        expectation
        for path in UNIT_TESTS
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]
        for expectation in test.get("alert_rule_test", ())
    ]


def _chart_groups(value_set: str, *arguments: str) -> list[dict[str, Any]]:
    manifest = only(render(value_set, *arguments), "PrometheusRule")
    groups: list[dict[str, Any]] = manifest["spec"]["groups"]
    return groups


@pytest.mark.parametrize("path", RULE_FILES, ids=lambda path: path.name)
def test_prometheus_accepts_the_rules(promtool: str, path: Path) -> None:
    _promtool(promtool, "check", "rules", "--lint=all", "--lint-fatal", str(path))


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.name)
def test_rules_do_what_their_unit_tests_say(promtool: str, path: Path) -> None:
    assert "SUCCESS" in _promtool(promtool, "test", "rules", str(path))


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_has_a_firing_and_a_silent_unit_test(alert: str) -> None:
    mine = [e for e in _alert_expectations() if e["alertname"] == alert]
    assert any(e["exp_alerts"] for e in mine), "no unit test in which it fires"
    assert any(not e["exp_alerts"] for e in mine), "no unit test in which it stays silent"


@pytest.mark.parametrize("rule", alerts(), ids=ALERTS)
def test_alert_has_severity_summary_and_a_section_in_the_runbook(rule: Rule) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    assert (page, anchor) == ("docs/runbook.md", rule["alert"].lower())
    assert rule["alert"] in headings


def test_recorded_names_are_ours_and_unique_per_labels() -> None:
    recorded = [(r["record"], str(r.get("labels"))) for r in rules() if "record" in r]
    assert all(name.startswith("sglang_alloc:") for name, _ in recorded)
    assert len(set(recorded)) == len(recorded)


def test_expressions_are_promql_for_a_second_parser_too() -> None:
    for rule in rules():
        assert metric_patterns(rule["expr"]) or rule["expr"].startswith("vector(")


def test_chart_ships_the_same_groups_with_its_own_slo_numbers() -> None:
    enabled = ("--set", "monitoring.prometheusRule.enabled=true")
    committed = {
        group["name"]: group
        for path in RULE_FILES
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    }
    shipped = {group["name"]: group for group in _chart_groups("default", *enabled)}
    assert shipped.keys() == committed.keys()
    for name, group in shipped.items():
        assert _sorted(group["rules"]) == _sorted(committed[name]["rules"]), name


def test_chart_follows_the_values(promtool: str, tmp_path: Path) -> None:
    groups = _chart_groups("everything")
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": groups}), encoding="utf-8")
    _promtool(promtool, "check", "rules", "--lint=all", "--lint-fatal", str(path))
    text = path.read_text(encoding="utf-8")
    assert 'le=~"0[.]5([.]0)?"' in text
    assert "vector(0.99)" in text
    assert "https://runbooks.example/sglang-alloc#sglangallocsaturated" in text
    assert "docs/runbook.md" not in text


def test_an_slo_that_is_not_promised_has_no_rules() -> None:
    groups = _chart_groups("everything", "--set", "controller.config.slo.ttft_seconds=null")
    edges = next(group for group in groups if group["name"] == "sglang-alloc-slo-edges")
    assert {r["labels"]["slo"] for r in edges["rules"] if "labels" in r} == {"itl"}


LATE_TOKENS = """
rule_files: [rules.yaml]
group_eval_order:
  [sglang-alloc-normalise, sglang-alloc-slo-edges, sglang-alloc-slo-errors, sglang-alloc-slo-alerts]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: sglang:inter_token_latency_seconds_bucket{instance="a", le="0.1"}
        values: 0+10x90
      - series: sglang:inter_token_latency_seconds_bucket{instance="a", le="+Inf"}
        values: 0+100x90
    promql_expr_test:
      - expr: count by (slo) (ALERTS{alertname="SglangAllocSloBurnFast", alertstate="firing"})
        eval_time: 80m
        exp_samples: [{labels: '{slo="itl"}', value: 1}]
"""


def test_late_tokens_page_where_no_first_token_is_promised(promtool: str, tmp_path: Path) -> None:
    no_ttft = "controller.config.slo.ttft_seconds=null,monitoring.prometheusRule.enabled=true"
    rules_text = yaml.safe_dump({"groups": _chart_groups("default", "--set", no_ttft)})
    (tmp_path / "rules.yaml").write_text(rules_text, encoding="utf-8")
    (tmp_path / "late.test.yaml").write_text(LATE_TOKENS, encoding="utf-8")
    assert "SUCCESS" in _promtool(promtool, "test", "rules", str(tmp_path / "late.test.yaml"))


def test_only_one_file_holds_numbers_that_an_operator_chooses() -> None:
    others = [path for path in RULE_FILES if path != RULES_FOLDER / "slo_edges.rules.yaml"]
    assert all("vector(" not in path.read_text(encoding="utf-8") for path in others)


def _sorted(group_rules: list[Rule]) -> list[Rule]:
    return sorted(group_rules, key=lambda rule: yaml.safe_dump(rule, sort_keys=True))
