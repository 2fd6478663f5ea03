"""The Job that makes budget tables is valid, runs commands that exist, and fits image and chart."""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer
import yaml
from chart_render import REPOSITORY, Manifest, container, only, render

from sglang_alloc.cli import app

PATH = REPOSITORY / "deploy" / "jobs" / "budget-tables.yaml"
PAGE = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")


@pytest.fixture
def job() -> Manifest:
    loaded: Manifest = yaml.safe_load(PATH.read_text(encoding="utf-8"))
    return loaded


def _pod(job: Manifest) -> Manifest:
    pod: Manifest = job["spec"]["template"]["spec"]
    return pod


def _commands(job: Manifest) -> list[list[str]]:
    (script,) = _pod(job)["containers"][0]["args"]
    return [shlex.split(line) for line in script.splitlines() if line.startswith("sglang-alloc ")]


def test_job_is_valid_kubernetes_without_unknown_fields() -> None:
    validate = [sys.executable, "-m", "kubernetes_validate", "--strict", "--no-warn", str(PATH)]
    result = subprocess.run(validate, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_command_line_accepts_every_command_of_the_job(job: Manifest) -> None:
    known: Any = typer.main.get_command(app)
    for _, name, *arguments in _commands(job):
        context = known.commands[name].make_context(name, arguments)
        assert context.args == ["--tp-size", "8"], "what is behind -- goes to SGLang"


def test_each_command_reads_what_the_one_before_it_wrote(job: Manifest) -> None:
    profile, calibrate, bench = _commands(job)
    assert [command[1] for command in (profile, calibrate, bench)] == [
        *("profile", "calibrate", "bench")
    ]
    assert profile[profile.index("-o") + 1] == calibrate[2]
    tables = calibrate[calibrate.index("-o") + 1]
    assert tables == bench[bench.index("--tables") + 1]


def test_job_may_do_and_write_what_the_charts_server_may(job: Manifest) -> None:
    manifests = render()
    of_chart = only(manifests, "Deployment")["spec"]["template"]["spec"]
    assert _pod(job)["securityContext"] == of_chart["securityContext"]
    server, (job_container,) = container(manifests, "sglang"), _pod(job)["containers"]
    assert job_container["securityContext"] == server["securityContext"]
    written = {mount["mountPath"] for mount in server["volumeMounts"]} - {"/run/sglang-alloc"}
    assert written <= {mount["mountPath"] for mount in job_container["volumeMounts"]}


def test_what_the_job_writes_lies_where_the_deploy_page_looks_for_it(job: Manifest) -> None:
    mounts = {m["name"]: m["mountPath"] for m in _pod(job)["containers"][0]["volumeMounts"]}
    claims = {v["name"]: v.get("persistentVolumeClaim") for v in _pod(job)["volumes"]}
    assert f"{{persistentVolumeClaim: {{claimName: {claims['budget-tables']['claimName']}}}}}" in (
        PAGE
    )
    assert f"{{cost_model: {mounts['budget-tables']}/bench/latency.csv" in PAGE
    assert f"job/{job['metadata']['name']}" in PAGE
    assert f"-t {_pod(job)['containers'][0]['image']} ." in PAGE
