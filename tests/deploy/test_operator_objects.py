"""The objects of the Prometheus operator and of KEDA have the shape of their APIs.

Their schemas are not in Kubernetes' own, and neither project's is at hand; what the chart uses of
them is written down here, after their API references, and anything else is refused.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Annotated, Literal

from chart_render import container, only, render
from promql_names import metric_patterns
from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Duration = Annotated[str, Field(pattern="^([0-9]+(ms|s|m|h|d))+$")]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Selector(_Closed):
    matchLabels: dict[str, str]  # noqa: N815 - the API's own name


class _Endpoint(_Closed):
    port: Text
    path: Text
    interval: Duration


class _PodMonitorSpec(_Closed):
    selector: _Selector
    podMetricsEndpoints: Annotated[list[_Endpoint], Field(min_length=1)]  # noqa: N815


class _Recording(_Closed):
    record: Text
    expr: Text
    labels: dict[str, str] = {}


class _Alert(_Closed):
    alert: Text
    expr: Text
    labels: dict[str, str]
    annotations: dict[str, str]
    pending_for: Duration = Field("0s", alias="for")


class _Group(_Closed):
    name: Text
    rules: list[_Recording | _Alert]


class _PrometheusRuleSpec(_Closed):
    groups: Annotated[list[_Group], Field(min_length=1)]


class _ScaleTarget(_Closed):
    name: Text


class _Fallback(_Closed):
    failureThreshold: Annotated[int, Field(ge=1)]  # noqa: N815
    replicas: Annotated[int, Field(ge=1)]
    behavior: Literal["currentReplicasIfHigher"]


class _Policy(_Closed):
    type: Literal["Pods", "Percent"]
    value: Annotated[int, Field(ge=1)]
    periodSeconds: Annotated[int, Field(ge=1, le=1800)]  # noqa: N815 - Kubernetes' own limit


class _Rules(_Closed):
    stabilizationWindowSeconds: Annotated[int, Field(ge=0, le=3600)]  # noqa: N815
    policies: list[_Policy]


class _Behavior(_Closed):
    scaleDown: _Rules  # noqa: N815


class _AutoscalerConfig(_Closed):
    behavior: _Behavior


class _Advanced(_Closed):
    horizontalPodAutoscalerConfig: _AutoscalerConfig  # noqa: N815


class _PrometheusMetadata(_Closed):
    """All of it is text in KEDA's API."""

    serverAddress: Annotated[str, Field(pattern="^https?://")]  # noqa: N815
    query: Text
    threshold: Annotated[str, Field(pattern="^[0-9.]+$")]
    ignoreNullValues: Literal["false"] | None = None  # noqa: N815


class _Authentication(_Closed):
    name: Text


class _Trigger(_Closed):
    type: Literal["prometheus"]
    metricType: Literal["AverageValue"]  # noqa: N815 - the fallback is for no other
    metadata: _PrometheusMetadata
    authenticationRef: _Authentication | None = None  # noqa: N815


class _ScaledObjectSpec(_Closed):
    scaleTargetRef: _ScaleTarget  # noqa: N815
    minReplicaCount: Annotated[int, Field(ge=1)]  # noqa: N815
    maxReplicaCount: Annotated[int, Field(ge=1)]  # noqa: N815
    pollingInterval: Annotated[int, Field(ge=1)]  # noqa: N815
    fallback: _Fallback
    advanced: _Advanced
    triggers: Annotated[list[_Trigger], Field(min_length=1)]


def test_scaled_object_has_kedas_shape_and_scales_the_deployment_that_names_no_replicas() -> None:
    manifests = render("everything")
    scaled, deployment = only(manifests, "ScaledObject"), only(manifests, "Deployment")
    spec = _ScaledObjectSpec.model_validate(scaled["spec"])
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    assert spec.scaleTargetRef.name == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "an upgrade would undo what KEDA did"
    assert spec.triggers[0].metadata.ignoreNullValues == "false"
    assert spec.triggers[0].metadata.threshold == "0.5"
    assert len(spec.triggers) == 2


# Of three replicas that serve, one sees a saturation of 0.5 and two are blind, in either way; the
# three together need 1.5. A fourth still loads its model and has no worker yet.
SATURATION = """
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: '{saturation}{{job="serving/demo-olmoe", instance="a:9500"}}', values: 0.5x10}}
      - {{series: '{saturation}{{job="serving/demo-olmoe", instance="b:9500"}}', values: NaN NaN NaN NaN}}
      - {{series: '{saturation}{{job="other/demo-olmoe", instance="x:9500"}}', values: 1x10}}
      - {{series: '{source}{{job="serving/demo-olmoe", instance="a:30000", source="override"}}', values: 0x10}}
      - {{series: '{source}{{job="serving/demo-olmoe", instance="a:30000", source="fallback"}}', values: 0x10}}
      - {{series: '{source}{{job="serving/demo-olmoe", instance="b:30000", source="fallback"}}', values: 0x10}}
      - {{series: '{source}{{job="serving/demo-olmoe", instance="c:30000", source="fallback"}}', values: 0x10}}
      - {{series: '{source}{{job="other/demo-olmoe", instance="x:30000", source="fallback"}}', values: 0x10}}
    promql_expr_test:
      - {{expr: '{query}', eval_time: 3m, exp_samples: [{{labels: '{{}}', value: 1.5}}]}}
  - interval: 1m
    input_series:
      - {{series: '{saturation}{{job="serving/demo-olmoe", instance="b:9500"}}', values: NaN NaN NaN NaN}}
      - {{series: '{source}{{job="serving/demo-olmoe", instance="b:30000", source="fallback"}}', values: 1x10}}
    promql_expr_test:
      - {{expr: '{query}', eval_time: 3m, exp_samples: []}}
"""  # noqa: E501


def test_blind_replicas_neither_scale_in_nor_out_and_all_blind_give_no_answer(
    promtool: str, tmp_path: Path
) -> None:
    trigger = only(render("everything"), "ScaledObject")["spec"]["triggers"][0]
    text = SATURATION.format(
        query=trigger["metadata"]["query"],
        saturation="sglang_alloc_controller_saturation_ratio",
        source="sglang_alloc_selection_source",
    )
    path = tmp_path / "saturation.test.yaml"
    path.write_text(text, encoding="utf-8")
    result = subprocess.run(
        [promtool, "test", "rules", str(path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_saturation_of_the_release_is_found_under_the_pod_monitors_job_or_a_given_one() -> None:
    def query(*arguments: str) -> str:
        scaled = only(render("everything", *arguments), "ScaledObject")
        text: str = scaled["spec"]["triggers"][0]["metadata"]["query"]
        return text

    monitor = only(render("everything"), "PodMonitor")["metadata"]
    assert f'{{job="{monitor["namespace"]}/{monitor["name"]}"}}' in query()
    given = query("--set-json", 'keda.selector="job=\\"moe\\""')
    assert given.count('{job="moe"}') == 3
    assert metric_patterns(given) == {
        "sglang_alloc_controller_saturation_ratio",
        "sglang_alloc_selection_source",
    }


def test_pod_monitor_has_the_operators_shape_and_carries_the_release_label() -> None:
    monitor = only(render("everything"), "PodMonitor")
    _PodMonitorSpec.model_validate(monitor["spec"])
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_pod_monitor_scrapes_ports_and_pods_that_exist() -> None:
    manifests = render("everything")
    monitor, deployment = only(manifests, "PodMonitor"), only(manifests, "Deployment")
    ports = {
        port["name"]
        for name in ("sglang", "controller")
        for port in container(manifests, name)["ports"]
    }
    assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} == ports
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_prometheus_rule_has_the_operators_shape_and_carries_the_release_label() -> None:
    rule = only(render("everything"), "PrometheusRule")
    _PrometheusRuleSpec.model_validate(rule["spec"])
    assert rule["apiVersion"] == "monitoring.coreos.com/v1"
    assert rule["metadata"]["labels"]["release"] == "prometheus"
