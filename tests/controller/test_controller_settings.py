"""The settings: what is accepted, and the sentence that refuses the rest."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from engine_counters import Engine
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from virtual_loop import VirtualController, make_settings, publish_table

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.law_state import Reason
from sglang_alloc_controller.settings import (
    FixedSettings,
    Settings,
    json_schema,
    load_settings,
    parse_settings,
)

ROOT = Path(__file__).parents[2]
MANUAL = ROOT / "docs" / "controller.md"
EXAMPLE = ROOT / "deploy" / "controller.example.yaml"
SCHEMA = ROOT / "controller" / "sglang_alloc_controller" / "config.schema.json"
MINIMAL: dict[str, Any] = {"table": "t.tbl", "slo": {"ttft_seconds": 1.0, "itl_seconds": 0.05}}


def _refusal(**changes: Any) -> str:
    with pytest.raises(ConfigurationError) as refused:
        parse_settings({**MINIMAL, **changes}, "c.yaml")
    return str(refused.value)


def test_only_the_table_and_the_latencies_are_required() -> None:
    assert parse_settings(MINIMAL).mode == "control"


def test_the_example_loads_and_shows_every_setting_with_its_default() -> None:
    example = load_settings(EXAMPLE)
    required = {"table": example.table, "slo": {"ttft_seconds": 1.0, "itl_seconds": 0.06}}
    assert example == parse_settings(required)
    written = yaml.safe_load(EXAMPLE.read_text())
    assert set(written) == set(Settings.model_fields) - {"fixed"}
    for name, section in written.items():
        if isinstance(section, dict):
            assert set(section) == set(type(getattr(example, name)).model_fields), name


def test_the_schema_in_the_repository_is_the_one_that_is_printed() -> None:
    assert SCHEMA.read_text() == json_schema()


def test_the_schema_accepts_the_example_and_refuses_an_unknown_key() -> None:
    schema = yaml.safe_load(json_schema())
    example = yaml.safe_load(EXAMPLE.read_text())
    jsonschema.validate(example, schema)
    with pytest.raises(jsonschema.ValidationError, match="typo"):
        jsonschema.validate({**example, "typo": 1}, schema)


def test_every_setting_is_described() -> None:
    for model in (Settings, *_sections()):
        for name, field in model.model_fields.items():
            section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            assert section or name == "fixed" or field.description, f"{model.__name__}.{name}"


def test_the_manual_lists_every_setting_with_its_default() -> None:
    rows = [line for line in MANUAL.read_text().splitlines() if line.startswith("| `")]
    listed = {tuple(row.split(" | ")[:2]) for row in rows}
    for name, field in Settings.model_fields.items():
        section = FixedSettings if name == "fixed" else field.annotation
        fields = {name: field}
        if isinstance(section, type) and issubclass(section, BaseModel):
            fields = {f"{name}.{key}": one for key, one in section.model_fields.items()}
        for key, one in fields.items():
            assert (f"| `{key}`", _written(one)) in listed


def _written(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return json.dumps(field.default).strip('"') or '""'


def test_the_manual_lists_every_reason_and_every_metric(tmp_path: Path) -> None:
    manual = MANUAL.read_text()
    for reason in Reason:
        assert f"`{reason.value}`" in manual
    publish_table(tmp_path / "t.tbl")
    controller = VirtualController(make_settings(tmp_path / "t.tbl"))
    controller.source = Engine(controller)  # a stale input would show no saturation
    controller.tick()
    text = controller.metrics.text().decode()
    names = set(re.findall(r"^sglang_alloc_controller_(\w+)", text, re.M))
    assert len(names) == 52
    for name in names:
        assert f"`{name}`" in manual, name


def _sections() -> list[type[BaseModel]]:
    annotations = [field.annotation for field in Settings.model_fields.values()]
    return [one for one in annotations if isinstance(one, type) and issubclass(one, BaseModel)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tabel": "x"}, "tabel is not a setting; remove it or correct its spelling."),
        ({"law": {"window": 3}}, "law.window is not a setting"),
        ({"mode": "auto"}, "mode is 'auto': it should be 'control', 'shadow' or 'fixed'."),
        ({"tick_seconds": 2.0}, "tick_seconds is 2.0: it should be less than or equal to 1."),
        ({"tick_seconds": "1"}, "tick_seconds is '1': it should be a valid number."),
        ({"law": None}, "law is empty; give it its settings or remove it."),
        (
            {"source": {"url": "localhost:30000"}},
            "source.url is 'localhost:30000': it must be http",
        ),
        ({"source": {"selector": '{job="x"}'}}, "must be matchers without braces"),
        ({"mode": "fixed"}, "mode is fixed, which needs fixed.prefill_budget"),
        (
            {"law": {"restore_burn_ratio": 1.0}},
            "restore_burn_ratio is 1.0 and must be below degrade_burn_ratio (1.0)",
        ),
        (
            {"quality": {"decode_floor_budget": 9, "decode_ceiling_budget": 8}},
            "decode_floor_budget is 9, which is above decode_ceiling_budget (8)",
        ),
        (
            {"law": {"window_seconds": 190.0}},
            "window_seconds is 190.0 and must be at most window_max_seconds (180.0)",
        ),
        (
            {"source": {"poll_seconds": 15.0}},
            "source.poll_seconds is 15.0 and must be below freshness.stale_after_seconds (5.0)",
        ),
    ],
)
def test_an_impossible_setting_is_refused_with_its_key(
    changes: dict[str, Any], sentence: str
) -> None:
    refusal = _refusal(**changes)
    assert refusal.startswith("In c.yaml: ")
    assert sentence in refusal


@pytest.mark.parametrize("ttft_seconds", [0, -1.0, float("nan"), float("inf")])
def test_a_latency_that_is_not_positive_and_finite_is_refused(ttft_seconds: float) -> None:
    slo = {"ttft_seconds": ttft_seconds, "itl_seconds": 0.05}
    assert "slo.ttft_seconds is " in _refusal(slo=slo)


@pytest.mark.parametrize("objective_ratio", [0.0, 1.0, 95])
def test_an_objective_that_is_no_share_is_refused(objective_ratio: float) -> None:
    slo = {**MINIMAL["slo"], "objective_ratio": objective_ratio}
    assert "slo.objective_ratio is " in _refusal(slo=slo)


def test_all_mistakes_are_told_at_once() -> None:
    refusal = _refusal(slo={"ttft_seconds": -1}, mode="x")
    assert "slo.ttft_seconds" in refusal
    assert "slo.itl_seconds is missing" in refusal
    assert "mode" in refusal


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Cannot read the configuration"):
        load_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty; it must hold keys such as table and slo"),
        ("- a\n", "is a list; it must hold keys"),
        ("table: [\n", "is not valid YAML"),
        ("table: a\nmode: control\ntable: b\n", "the key table is there twice, line 3"),
        ("mode: 2020-13-45\n", "holds a value that cannot be read: month must be in 1..12"),
        ("tick_seconds: !!float fast\n", "holds a value that cannot be read: could not convert"),
        ("mode: !!timestamp now\n", "holds a value that cannot be read"),
        ("quality: " + 5000 * "[", "holds a value that cannot be read: maximum recursion depth"),
        ("tick_seconds: " + 5000 * "9", "holds a value that cannot be read: Exceeds the limit"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        load_settings(path)
    assert sentence in str(refused.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="is not UTF-8 text"):
        load_settings(path)
