"""The two objects of the Prometheus operator have the shape of its API.

Their schemas are not in Kubernetes' own; what the chart uses of them is written down here, after
the operator's API reference, and anything else is refused.
"""

from __future__ import annotations

from typing import Annotated

from chart_render import container, only, render
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
