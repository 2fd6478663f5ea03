"""The two operators' pages speak of what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from chart_render import CHART, REPOSITORY, Manifest, container, helm, only
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
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= _anchors(text)


def test_links_of_the_deploy_page_into_itself_and_the_runbook_lead_somewhere() -> None:
    text = DEPLOY_PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= _anchors(text)
    into_the_runbook = set(re.findall(r"\]\(runbook\.md#([\w-]+)\)", text))
    assert into_the_runbook <= _anchors(RUNBOOK.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [DEPLOY_PAGE, RUNBOOK], ids=lambda page: page.stem)
def test_commands_to_a_cluster_say_in_which_namespace(page: Path) -> None:
    without = re.findall(r"kubectl (?!-n serving )(.*?)[`\n]", page.read_text(encoding="utf-8"))
    # The first makes the namespace; the manifest that the second reads says in which it is.
    assert set(without) <= {"create namespace serving", "replace -f -"}


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


def _shown_values() -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", DEPLOY_PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("text", _shown_values(), ids=lambda text: text.split(":")[0])
def test_chart_takes_all_values_that_the_deploy_page_shows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(text, encoding="utf-8")
    helm("lint", "--strict", str(CHART), "--values", str(path))


@pytest.fixture
def example(tmp_path: Path) -> list[Manifest]:
    """What the chart makes of the values that the deploy page shows."""
    (text,) = [block for block in _shown_values() if "servedName" in block]
    path = tmp_path / "my-values.yaml"
    path.write_text(text, encoding="utf-8")
    helm("lint", "--strict", str(CHART), "--values", str(path))
    rendered = helm("template", "moe", str(CHART), "--values", str(path)).stdout
    return [document for document in yaml.safe_load_all(rendered) if document]


def test_example_values_give_eight_gpus_and_the_bounds_that_they_say(
    example: list[Manifest],
) -> None:
    sglang = container(example, "sglang")
    assert sglang["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert sglang["args"][-2:] == ["--tp-size", "8"]
    config = yaml.safe_load(
        only(example, "ConfigMap", "moe-sglang-alloc-controller")["data"]["controller.yaml"]
    )
    assert config["slo"]["itl_seconds"] == 0.06
    assert config["quality"] == {"max_predicted_loss": 0.01}


def test_deploy_page_restarts_the_deployment_that_its_example_makes(
    example: list[Manifest],
) -> None:
    name = only(example, "Deployment")["metadata"]["name"]
    text = DEPLOY_PAGE.read_text(encoding="utf-8")
    assert f"kubectl -n serving rollout restart deployment/{name}\n" in text
    assert f"create configmap {name}-budget-tables " in text


def test_example_values_turn_on_all_monitoring_under_one_release_label(
    example: list[Manifest],
) -> None:
    labels = [only(example, k)["metadata"]["labels"] for k in ("PodMonitor", "PrometheusRule")]
    assert {each["release"] for each in labels} == {"kube-prometheus-stack"}
    only(example, "ConfigMap", "moe-sglang-alloc-dashboard")


def test_set_fails_where_the_deploy_page_says_so_and_set_json_works() -> None:
    seconds = "controller.config.slo.itl_seconds=0.06"
    for wrong in (seconds, "sglang.extraArgs={--tp-size,8}"):
        refused = helm("template", "moe", str(CHART), "--set", wrong, check=False)
        assert refused.returncode != 0
    helm("template", "moe", str(CHART), "--set-json", seconds)


def test_first_aid_names_the_kill_switch_where_the_chart_has_it() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    table = "{mountPath}/{fileName}".format(**values["sharedTable"])
    text = RUNBOOK.read_text(encoding="utf-8")
    first_aid = text.split("## First aid")[1].split("\n## ")[0]
    left_on = text.split("## SglangAllocKillSwitchLeftOn")[1].split("\n## ")[0]
    assert f"kubectl -n serving exec POD -c controller -- touch {table}.kill" in first_aid
    for section in (first_aid, left_on):
        assert f"kubectl -n serving exec POD -c controller -- rm {table}.kill" in section


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
