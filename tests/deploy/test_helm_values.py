"""Wrong values are refused by helm itself, before anything reaches a cluster."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import values_schema
import yaml
from chart_render import CHART, helm

REFUSED = [
    ("replicas=2", "additional properties 'replicas' not allowed"),
    ('worker.mode="fastest"', "/worker/mode"),
    ('worker.fallback="none"', "/worker/fallback"),
    ('worker.requestBudgets="all"', "/worker/requestBudgets"),
    ('worker.routing="ours"', "/worker/routing"),
    ("worker.staleAfterSeconds=0", "/worker/staleAfterSeconds"),
    ('sharedTable.mountPath="relative"', "/sharedTable/mountPath"),
    ('sharedTable.sizeLimit="big"', "/sharedTable/sizeLimit"),
    ('budgetTables.fileName="tables.csv"', "/budgetTables/fileName"),
    ("controller.metricsPort=99999", "/controller/metricsPort"),
    ('controller.config.mode="auto"', "/controller/config/mode"),
    ("controller.config.slo.objective_ratio=1.5", "/controller/config/slo/objective_ratio"),
    ("controller.config.slo.ttft=1", "additional properties 'ttft' not allowed"),
    ('controller.config.table="/tmp/x"', "additional properties 'table' not allowed"),
    ("podSecurity.runAsUser=0", "/podSecurity/runAsUser"),
    ('monitoring.podMonitor.interval="often"', "/monitoring/podMonitor/interval"),
    ('monitoring.podMonitor.interval="5m"', "/monitoring/podMonitor/interval"),
    ('monitoring.podMonitor.interval="61s"', "/monitoring/podMonitor/interval"),
    ('nameOverride="Foo_Bar"', "/nameOverride"),
    ('fullnameOverride="1st"', "/fullnameOverride"),
    ("worker.correctDrift=1", "/worker/correctDrift"),
    ('worker.priorityFloors="5"', "/worker/priorityFloors"),
    ('worker.priorityFloors="0:12, 5:30"', "/worker/priorityFloors"),
    ('worker.priorityFloors="5:most"', "/worker/priorityFloors"),
    ("worker.priorityFloors={}", "/worker/priorityFloors"),
    ('controller.controlTokenSecret.key=""', "/controller/controlTokenSecret/key"),
    ("controller.extraVolumeMounts=[{}]", "/controller/extraVolumeMounts/0"),
    ("sglang.extraVolumes=[{}]", "/sglang/extraVolumes/0"),
    ("sglang.extraVolumeMounts=[{}]", "/sglang/extraVolumeMounts/0"),
    ("keda.minReplicas=0", "/keda/minReplicas"),
    ("keda.saturationThreshold=2", "/keda/saturationThreshold"),
    ('keda.prometheusAddress="prometheus:9090"', "/keda/prometheusAddress"),
]
# Each value is possible; together they are not.
IMPOSSIBLE = [
    ("sglang.port=9464", "sglang.port and controller.metricsPort are both 9464"),
    ("sglang.ttftBucketsSeconds=[2,1]", "sglang.ttftBucketsSeconds [2 1] must go up"),
    ('worker={"correctDrift":true,"mode":"layer"}', "but worker.mode is layer"),
    ('worker={"protectedPriority":0,"priorityFloors":"-5:30"}', "let the floors end with 0:full"),
    ('controller.config.mode="fixed"', "needs controller.config.fixed.prefill_budget"),
    ('controller.config.source.kind="prometheus"', "needs controller.config.source.url"),
    ("controller.config.source.poll_seconds=5", "must be below controller.config.freshness.stale"),
    (
        'controller.config.quality={"decode_floor_budget":9,"decode_ceiling_budget":8}',
        "decode_floor_budget is 9, which is above decode_ceiling_budget (8)",
    ),
    ("keda.enabled=true", "keda.enabled needs keda.prometheusAddress"),
    (
        'keda={"enabled":true,"prometheusAddress":"http://p:9090","minReplicas":5}',
        "keda.minReplicas is 5, which is above keda.maxReplicas (4)",
    ),
    (
        'controller.enabled=false,keda={"enabled":true,"prometheusAddress":"http://p:9090"}',
        "but controller.enabled is false",
    ),
]


@pytest.mark.parametrize(("setting", "reason"), REFUSED, ids=[s for s, _ in REFUSED])
def test_wrong_value_is_refused_naming_its_place(setting: str, reason: str) -> None:
    result = helm("template", "demo", str(CHART), "--set-json", setting, check=False)
    assert result.returncode != 0
    assert reason in result.stderr


@pytest.mark.parametrize(("setting", "reason"), IMPOSSIBLE, ids=[s for s, _ in IMPOSSIBLE])
def test_values_that_are_impossible_together_are_refused_saying_why(
    setting: str, reason: str
) -> None:
    result = helm("template", "demo", str(CHART), "--set-json", setting, check=False)
    assert result.returncode != 0
    assert reason in result.stderr


POSSIBLE = [
    "sglang.port=9464,controller.enabled=false",
    'worker={"correctDrift":true,"mode":"threshold"}',
    "worker.protectedPriority=0",
    'worker.priorityFloors="-1:12,5:30,10:full"',
    'controller.config={"mode":"fixed","fixed":{"prefill_budget":9,"decode_budget":9}}',
    'controller.config.source={"kind":"prometheus","url":"http://prometheus:9090"}',
    "controller.config.source.poll_seconds=4.9",
    'controller.config.quality={"decode_floor_budget":8,"decode_ceiling_budget":8}',
    'monitoring.podMonitor={"enabled":true,"interval":"60s"}',
    'monitoring.podMonitor={"enabled":true,"interval":"1m"}',
    'nameOverride="qwen3-30b"',
]


@pytest.mark.parametrize("setting", POSSIBLE)
def test_their_possible_neighbours_are_accepted(setting: str) -> None:
    helm("template", "demo", str(CHART), "--set-json", setting)


def test_slo_without_a_bucket_at_its_edge_is_refused() -> None:
    setting = "controller.config.slo.itl_seconds=0.05"
    result = helm("template", "demo", str(CHART), "--set-json", setting, check=False)
    assert result.returncode != 0
    assert "slo.itl_seconds is 0.05, which is not an edge of sglang.itlBucketsSeconds" in (
        result.stderr
    )


def test_controller_part_of_the_schema_is_the_controllers_own() -> None:
    text = values_schema.SCHEMA_PATH.read_text(encoding="utf-8")
    assert values_schema.updated_schema(text) == text, (
        "a setting changed: run `python deploy/helm/values_schema.py`"
    )


def test_every_object_of_the_schema_with_named_keys_refuses_others() -> None:
    schema = json.loads(values_schema.SCHEMA_PATH.read_text(encoding="utf-8"))
    open_objects = [path for path, node in _nodes(schema, "") if _is_open(node)]
    assert open_objects == []


def test_every_value_of_the_chart_is_described_by_the_schema() -> None:
    schema = json.loads(values_schema.SCHEMA_PATH.read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert set(values) == set(schema["properties"]) - {"global"}


def test_every_value_of_the_chart_has_a_comment_or_shares_that_of_what_is_above_it() -> None:
    lines = (CHART / "values.yaml").read_text(encoding="utf-8").splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r" *\w+:", line)]
    assert len(keys) > 80
    assert [lines[number] for number in keys if not _is_commented(lines, number)] == []


def _is_commented(lines: list[str], number: int) -> bool:
    """Tell whether a comment comes before a gap, upwards through siblings and the block's key."""
    indent = _indent(lines[number])
    for above in range(number - 1, -1, -1):
        line = lines[above].strip()
        if not line or line.startswith("#"):
            return bool(line)
        if _indent(lines[above]) <= indent:
            return _is_commented(lines, above)
    return False


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_open(node: dict[str, Any]) -> bool:
    return bool(node.get("properties")) and node.get("additionalProperties") is not False


def _nodes(node: Any, path: str) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(node, list):
        return [n for i, v in enumerate(node) for n in _nodes(v, f"{path}/{i}")]
    if not isinstance(node, dict):
        return []
    children = [n for key, value in node.items() for n in _nodes(value, f"{path}/{key}")]
    return [(path, node), *children] if isinstance(node.get("type"), str) else children
