"""The chart lints, renders valid Kubernetes objects, and keeps the promises of docs/deploy.md."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from chart_render import (
    CHART,
    REPOSITORY,
    VALUE_SETS,
    Manifest,
    container,
    golden_path,
    golden_text,
    helm,
    only,
    render,
    values_arguments,
)

from sglang_alloc_controller.config_follower import RESTART_SECTIONS
from sglang_alloc_controller.settings import Settings

# Their schemas are not in Kubernetes' own: test_operator_objects.py has them.
OTHERS = ("monitoring.coreos.com/v1", "keda.sh/v1alpha1")
ALL_SETS = pytest.mark.parametrize("value_set", VALUE_SETS)


def _pod(manifests: list[Manifest]) -> Manifest:
    pod: Manifest = only(manifests, "Deployment")["spec"]["template"]["spec"]
    return pod


def _containers(manifests: list[Manifest]) -> list[Manifest]:
    pod = _pod(manifests)
    return [*pod["initContainers"], *pod["containers"]]


@ALL_SETS
def test_helm_lint_finds_nothing_even_when_strict(value_set: str) -> None:
    helm("lint", "--strict", str(CHART), *values_arguments(value_set))


@ALL_SETS
def test_render_equals_the_accepted_one(value_set: str) -> None:
    assert golden_text(value_set) == golden_path(value_set).read_text(encoding="utf-8"), (
        "the render changed: run `python tests/deploy/chart_render.py` and read the diff"
    )


@ALL_SETS
def test_every_object_is_valid_kubernetes_without_unknown_fields(
    value_set: str, tmp_path: Path
) -> None:
    built_in = [m for m in render(value_set) if m["apiVersion"] not in OTHERS]
    path = tmp_path / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(built_in), encoding="utf-8")
    validate = [sys.executable, "-m", "kubernetes_validate", "--strict", "--no-warn", str(path)]
    result = subprocess.run(validate, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("passed") == len(built_in), result.stdout


@ALL_SETS
def test_every_object_lies_in_the_namespace_of_the_release_with_common_labels(
    value_set: str,
) -> None:
    for manifest in render(value_set):
        metadata = manifest["metadata"]
        assert metadata["namespace"] in ("serving", "monitoring"), metadata["name"]
        assert metadata["labels"]["app.kubernetes.io/instance"] == "demo"
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "sglang-alloc"


@ALL_SETS
def test_no_container_may_do_more_than_it_needs(value_set: str) -> None:
    manifests = render(value_set)
    pod = _pod(manifests)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for each in _containers(manifests):
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@ALL_SETS
def test_all_containers_see_the_shared_table_at_one_path_in_memory(value_set: str) -> None:
    manifests = render(value_set)
    volume = next(v for v in _pod(manifests)["volumes"] if v["name"] == "shared-table")
    assert volume["emptyDir"]["medium"] == "Memory"
    mounts = [
        mount
        for each in _containers(manifests)
        for mount in each["volumeMounts"]
        if mount["name"] == "shared-table"
    ]
    assert mounts == [{"name": "shared-table", "mountPath": "/run/sglang-alloc"}] * len(mounts)
    assert len(mounts) == len(_containers(manifests))


def test_table_is_published_before_the_controller_and_both_before_sglang() -> None:
    pod = _pod(render())
    publish, controller = pod["initContainers"]
    assert (publish["name"], controller["name"]) == ("publish-table", "controller")
    assert "restartPolicy" not in publish, "an ordinary init container runs to its end first"
    assert controller["restartPolicy"] == "Always", "a native sidecar runs beside SGLang"
    assert [each["name"] for each in pod["containers"]] == ["sglang"]


def test_sglang_starts_through_serve_and_has_a_long_startup_probe() -> None:
    sglang = container(render(), "sglang")
    assert sglang["command"] == ["sglang-alloc", "serve"]
    assert sglang["args"][:2] == ["--", "--model-path"], "all arguments are SGLang's own"
    startup = sglang["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1200


def test_sglang_is_told_how_to_follow_the_table() -> None:
    def environment(value_set: str) -> dict[str, str]:
        variables = container(render(value_set), "sglang")["env"]
        return {v["name"]: v["value"] for v in variables if v["name"].startswith("SGLANG_ALLOC_")}

    assert environment("everything") == {
        "SGLANG_ALLOC_TABLE": "/run/sglang-alloc/model.tbl",
        "SGLANG_ALLOC_MODE": "threshold",
        "SGLANG_ALLOC_STALE_AFTER_SECONDS": "7.5",
        "SGLANG_ALLOC_FALLBACK": "96",
        "SGLANG_ALLOC_REQUEST_BUDGETS": "any",
        "SGLANG_ALLOC_PRIORITY_FLOORS": "-1:64,0:full",
        "SGLANG_ALLOC_CORRECT_DRIFT": "1",
        "SGLANG_ALLOC_ROUTING": "fused",
    }
    assert "SGLANG_ALLOC_CORRECT_DRIFT" not in environment("default")
    assert "SGLANG_ALLOC_PRIORITY_FLOORS" not in environment("default")


def test_a_protected_priority_of_zero_is_one() -> None:
    text = helm("template", "demo", str(CHART), "--set-json", "worker.protectedPriority=0").stdout
    assert re.search(r'- name: SGLANG_ALLOC_PROTECTED_PRIORITY\n +value: "0"\n', text)
    assert "SGLANG_ALLOC_PROTECTED_PRIORITY" not in helm("template", "demo", str(CHART)).stdout


def test_a_controller_that_cannot_work_neither_delays_sglang_nor_takes_it_out_of_service() -> None:
    """A sidecar's probes, and its end, count for the start and the readiness of the whole pod."""
    controller = container(render(), "controller")
    assert not {"startupProbe", "readinessProbe", "livenessProbe"} & controller.keys()
    assert controller["args"][-2:] == ["--retry-seconds", "10"], "it waits instead of ending"


def test_without_a_controller_no_part_of_it_remains() -> None:
    manifests = render("minimal")
    assert [each["name"] for each in _containers(manifests)] == ["publish-table", "sglang"]
    assert {m["kind"] for m in manifests} == {"Deployment", "Service"}


def test_optional_objects_are_off_by_default_and_on_when_asked_for() -> None:
    always = {"Deployment", "Service", "ServiceAccount", "ConfigMap"}
    optional = {"PodMonitor", "PrometheusRule", "NetworkPolicy", "PodDisruptionBudget"}
    optional |= {"ScaledObject"}
    assert {m["kind"] for m in render()} == always
    assert {m["kind"] for m in render("everything")} == always | optional


# A changed value of each section of the controller's configuration, as helm's argument.
CHANGES = {
    "table": "sharedTable.fileName=other.tbl",
    "mode": "controller.config.mode=control",
    "tick_seconds": "controller.config.tick_seconds=1",
    "source": "controller.config.source.poll_seconds=2",
    "slo": "controller.config.slo.queue_requests=9",
    "quality": "controller.config.quality.decode_floor_budget=9",
    "fixed": "controller.config.fixed.prefill_budget=9,controller.config.fixed.decode_budget=9",
    "law": "controller.config.law.min_samples=9",
    "freshness": "controller.config.freshness.hold_seconds=9",
    "http": "controller.metricsPort=9999",
    "control": "controller.controlTokenSecret.name=tokens",
    "kill_switch": "controller.config.kill_switch.path=/tmp/kill",
    "decision_log": "controller.config.decision_log.path=/tmp/log",
}


def _checksum(*arguments: str) -> str | None:
    template = only(render("default", *arguments), "Deployment")["spec"]["template"]
    value: str | None = template["metadata"]["annotations"].get("checksum/controller-config")
    return value


@pytest.mark.parametrize("section", Settings.model_fields)
def test_only_what_the_controller_cannot_follow_restarts_the_pod_and_only_if_asked_to(
    section: str,
) -> None:
    asked, change = ("--set", "controller.restartOnConfigChange=true"), ("--set", CHANGES[section])
    assert _checksum(*change) is None
    restarts = _checksum(*asked) != _checksum(*asked, *change)
    assert restarts == (section in RESTART_SECTIONS)


def test_budget_tables_and_a_cost_model_beside_them_can_be_read_by_the_controller() -> None:
    manifests = render("everything")
    mounts = {
        name: next(m for m in container(manifests, name)["volumeMounts"] if "tables" in m["name"])
        for name in ("publish-table", "controller")
    }
    assert mounts["controller"] == mounts["publish-table"]
    assert mounts["controller"]["readOnly"] is True


def test_control_token_comes_from_its_secret_and_a_missing_one_does_not_hold_up_the_pod() -> None:
    manifests = render("everything")
    volume = next(v for v in _pod(manifests)["volumes"] if v["name"] == "control-token")["secret"]
    assert (volume["secretName"], volume["optional"]) == ("control-token", True)
    assert volume["items"] == [{"key": "bearer", "path": "token"}]
    mounts = container(manifests, "controller")["volumeMounts"]
    folder = next(m["mountPath"] for m in mounts if m["name"] == "control-token")
    text = only(manifests, "ConfigMap", "demo-olmoe-controller")["data"]["controller.yaml"]
    assert yaml.safe_load(text)["control"] == {"token_file": f"{folder}/token"}


def test_two_places_for_one_token_are_refused() -> None:
    token_file = "controller.config.control.token_file=/tmp/token"
    arguments = ("--set", token_file, "--set", "controller.controlTokenSecret.name=tokens")
    result = helm("template", "demo", str(CHART), *arguments, check=False)
    assert "controlTokenSecret.name and controller.config.control.token_file" in result.stderr


def test_controller_has_the_environment_and_the_volumes_that_it_is_given() -> None:
    manifests = render("everything")
    controller = container(manifests, "controller")
    assert {"name": "SGLANG_ALLOC_KILL_SWITCH", "value": "0"} in controller["env"]
    assert {"name": "decisions", "mountPath": "/var/log/sglang-alloc"} in controller["volumeMounts"]
    assert any(v["name"] == "decisions" for v in _pod(manifests)["volumes"])


def test_sglang_has_the_environment_and_the_volumes_that_it_is_given() -> None:
    manifests = render("everything")
    sglang = container(manifests, "sglang")
    assert {"name": "SGLANG_MOE_CONFIG_DIR", "value": "/launches"} in sglang["env"]
    mount = {"name": "launches", "mountPath": "/launches", "readOnly": True}
    assert mount in sglang["volumeMounts"]
    volume = {"name": "launches", "configMap": {"name": "launches"}}
    assert volume in _pod(manifests)["volumes"]
    assert mount not in container(manifests, "controller")["volumeMounts"]


def test_a_new_chart_version_alone_does_not_reload_the_model() -> None:
    labels = only(render(), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(labels)


def test_dashboard_config_map_ships_the_committed_dashboard() -> None:
    config_map = only(render("everything"), "ConfigMap", "demo-olmoe-dashboard")
    committed = REPOSITORY / "deploy" / "grafana" / "sglang-alloc.json"
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config_map["data"]["sglang-alloc.json"].strip() == committed.read_text().strip()


def test_package_holds_the_rules_and_the_dashboard_themselves(tmp_path: Path) -> None:
    helm("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("*.tgz")
    with tarfile.open(package) as archive:
        sizes = {m.name: m.size for m in archive.getmembers() if "/files/" in m.name}
        assert all(m.isfile() for m in archive.getmembers())
    assert len(sizes) == 4
    assert min(sizes.values()) > 500


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "sglang-alloc status"),
        (("--set", "controller.enabled=false"), "nothing moves the budget"),
    ],
)
def test_notes_say_how_to_watch_the_budget(arguments: tuple[str, ...], expected: str) -> None:
    notes = helm("install", "demo", str(CHART), "--dry-run=client", *arguments).stdout
    assert expected in notes
    assert "helm uninstall demo" in notes
