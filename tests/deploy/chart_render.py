"""Render the Helm chart for the tests; run this file to accept the present renders as golden.

`python tests/deploy/chart_render.py` rewrites tests/deploy/golden: read its diff before committing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CHART = REPOSITORY / "deploy" / "helm" / "sglang-alloc"
HELM = REPOSITORY / ".tools" / "bin" / "helm"
VALUE_SETS = ("default", "minimal", "everything")
# Rendered from files that have tests of their own; in a golden file they would only be repeated.
ELIDED = "(elided: shipped verbatim from another file)"

Manifest = dict[str, Any]


def helm(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run helm on nothing but the chart: no cluster, no configuration of the user's."""
    environment = {"PATH": os.defpath, "HOME": "/nonexistent", "KUBECONFIG": os.devnull}
    result = subprocess.run(
        [str(HELM), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if check and result.returncode != 0:
        raise AssertionError(f"helm {' '.join(arguments)} failed:\n{result.stdout}{result.stderr}")
    return result


def values_arguments(value_set: str) -> list[str]:
    """Return helm's arguments for one of VALUE_SETS; the default set is the chart's own values."""
    return (
        [] if value_set == "default" else ["--values", str(HERE / "values" / f"{value_set}.yaml")]
    )


def render(value_set: str = "default", *arguments: str) -> list[Manifest]:
    """Return the rendered manifests in the order in which helm prints them."""
    text = helm(
        *("template", "demo", str(CHART), "--namespace", "serving"),
        *values_arguments(value_set),
        *arguments,
    ).stdout
    return [document for document in yaml.safe_load_all(text) if document]


def only(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """Return the one manifest of this kind (and name)."""
    found = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    assert len(found) == 1, f"expected one {kind} {name or ''}, found {len(found)}"
    return found[0]


def container(manifests: list[Manifest], name: str) -> Manifest:
    """Return the container or init container `name` of the Deployment."""
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    found: list[Manifest] = [
        c for c in (*pod["initContainers"], *pod["containers"]) if c["name"] == name
    ]
    assert len(found) == 1, f"expected one container {name}, found {len(found)}"
    return found[0]


def golden_text(value_set: str) -> str:
    """Return the render as the golden file holds it."""
    manifests = render(value_set)
    for manifest in manifests:
        if manifest["kind"] == "PrometheusRule":
            manifest["spec"]["groups"] = ELIDED
        if "sglang-alloc.json" in manifest.get("data", {}):
            manifest["data"]["sglang-alloc.json"] = ELIDED
    return yaml.safe_dump_all(manifests, sort_keys=False, width=100)


def golden_path(value_set: str) -> Path:
    """Return where the accepted render of `value_set` lies."""
    return HERE / "golden" / f"{value_set}.yaml"


def main() -> None:
    """Accept the present renders."""
    for value_set in VALUE_SETS:
        golden_path(value_set).write_text(golden_text(value_set), encoding="utf-8")
        print(golden_path(value_set).relative_to(REPOSITORY), file=sys.stderr)


if __name__ == "__main__":
    main()
