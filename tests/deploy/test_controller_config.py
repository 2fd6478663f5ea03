"""What the chart puts into the ConfigMap is a configuration that the controller itself accepts."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from chart_render import REPOSITORY, container, only, render

from sglang_alloc_controller.settings import Settings, load_settings


def _settings(tmp_path: Path, value_set: str, *arguments: str) -> Settings:
    """Write the rendered file as the kubelet would and load it as the controller does."""
    manifests = render(value_set, *arguments)
    config_map = next(
        m for m in manifests if m["kind"] == "ConfigMap" and "controller.yaml" in m["data"]
    )
    path = tmp_path / "controller.yaml"
    path.write_text(config_map["data"]["controller.yaml"], encoding="utf-8")
    return load_settings(path)


def test_default_configuration_is_shadow_mode(tmp_path: Path) -> None:
    settings = _settings(tmp_path, "default")
    assert settings.mode == "shadow"
    assert (settings.slo.ttft_seconds, settings.slo.itl_seconds) == (2.0, 0.1)


@pytest.mark.parametrize("value_set", ["default", "everything"])
def test_configuration_names_what_the_pod_really_has(tmp_path: Path, value_set: str) -> None:
    settings = _settings(tmp_path, value_set)
    manifests = render(value_set)
    sglang = container(manifests, "sglang")
    ports = {p["name"]: p["containerPort"] for p in container(manifests, "controller")["ports"]}
    environment = {each["name"]: each["value"] for each in sglang["env"]}
    assert settings.table == environment["SGLANG_ALLOC_TABLE"]
    assert settings.source.url == f"http://127.0.0.1:{sglang['ports'][0]['containerPort']}"
    assert (settings.http.host, settings.http.port) == ("0.0.0.0", ports["ctrl-metrics"])


def test_numbers_reach_the_controller_unchanged(tmp_path: Path) -> None:
    settings = _settings(tmp_path, "everything")
    assert settings.decision_log.max_bytes == 20_000_000
    assert settings.quality.decode_floor_budget == 64
    assert settings.quality.max_predicted_loss == 0.02


def test_null_slo_is_no_promise(tmp_path: Path) -> None:
    settings = _settings(tmp_path, "default", "--set", "controller.config.slo.ttft_seconds=null")
    assert settings.slo.ttft_seconds is None
    assert settings.slo.itl_seconds == 0.1


def test_own_source_is_kept(tmp_path: Path) -> None:
    source = "controller.config.source"
    settings = _settings(
        tmp_path,
        "default",
        "--set",
        f"{source}.kind=prometheus,{source}.url=http://prometheus:9090",
    )
    assert (settings.source.kind, settings.source.url) == ("prometheus", "http://prometheus:9090")


def test_config_map_is_mounted_as_a_folder_where_the_controller_reads_it() -> None:
    manifests = render()
    controller = container(manifests, "controller")
    config_map = only(manifests, "ConfigMap")
    mount = next(m for m in controller["volumeMounts"] if m["name"] == "controller-config")
    assert "subPath" not in mount, "a subPath mount would never see a changed ConfigMap"
    (file_name,) = config_map["data"]
    assert f"{mount['mountPath']}/{file_name}" in controller["args"]


EXAMPLE = REPOSITORY / "deploy" / "controller.example.yaml"


def test_example_configuration_is_accepted_by_the_controller() -> None:
    load_settings(EXAMPLE)


@pytest.mark.parametrize(
    ("slo", "histogram"),
    [("ttft_seconds", "time_to_first_token"), ("itl_seconds", "inter_token_latency")],
)
def test_example_slos_are_edges_of_an_sglang_that_was_told_none(slo: str, histogram: str) -> None:
    edges = _default_edges(f"bucket_{histogram}")
    assert getattr(load_settings(EXAMPLE).slo, slo) in edges


def _default_edges(name: str) -> list[float]:
    """Read a list of buckets from SGLang's source; importing it would take most of a minute."""
    (origin,) = find_spec("sglang").submodule_search_locations  # type: ignore[union-attr, misc]
    (source,) = Path(origin).glob("srt/**/metrics_collector.py")
    lists = [
        ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.List)
        and ast.unparse(node.targets[0]) == name
    ]
    assert len(lists) == 1, name
    edges: list[float] = lists[0]
    return edges
