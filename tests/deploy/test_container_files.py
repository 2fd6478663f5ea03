"""The container files, linted by reading: there is no engine here that could build them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from chart_render import CHART, REPOSITORY, container, render

FOLDER = REPOSITORY / "deploy" / "container"
WORKER = FOLDER / "worker.Dockerfile"
ENGINE = {"torch": "2.11.0", "triton": "3.6.0", "sglang": "0.5.23", "sglang-kernel": "0.4.10"}
FILES = sorted(FOLDER.glob("*.Dockerfile"))
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

Instruction = tuple[str, str]


def _instructions(path: Path) -> list[Instruction]:
    """Return (keyword, rest) of each instruction, comments left out and continuations joined."""
    lines = [li for li in path.read_text(encoding="utf-8").splitlines() if not li.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(keyword, rest) for keyword, rest in pairs]


def _values(path: Path, keyword: str) -> list[str]:
    return [rest for found, rest in _instructions(path) if found == keyword]


def test_there_is_one_file_for_each_image_of_the_chart() -> None:
    assert [path.stem for path in FILES] == ["controller", "worker"]


@EACH_FILE
def test_only_known_instructions_are_used(path: Path) -> None:
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {keyword for keyword, _ in _instructions(path)} <= known


@EACH_FILE
def test_image_runs_as_the_charts_user(path: Path) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["podSecurity"]
    assert _values(path, "USER") == [f"{values['runAsUser']}:{values['runAsGroup']}"]


@EACH_FILE
def test_everything_that_is_copied_in_exists_and_suffices_to_install(path: Path) -> None:
    copies = [rest.split()[:-1] for rest in _values(path, "COPY") if not rest.startswith("--from")]
    sources = {source for words in copies for source in words}
    assert all((REPOSITORY / source).exists() for source in sources)
    assert sources == {
        *("pyproject.toml", "README.md", "LICENSE"),
        *("sglang_alloc", "kernels", "controller"),
    }


def test_controllers_image_starts_from_plain_python_and_installs_nothing_but_the_package() -> None:
    path = FOLDER / "controller.Dockerfile"
    assert all(rest.startswith("python:3.12-slim") for rest in _values(path, "FROM"))
    installs = [rest for rest in _values(path, "RUN") if "pip install" in rest]
    assert len(installs) == 1
    assert installs[0].endswith("pip install --no-cache-dir .")


def test_workers_image_is_the_users_sglang_and_proves_that_it_is_unchanged() -> None:
    assert _values(WORKER, "FROM") == ["${SGLANG_IMAGE}"]
    guard = _guard()
    assert guard.index("> /tmp/before") < guard.index("pip install") < guard.index("diff")


def _guard() -> str:
    (run,) = [rest for rest in _values(WORKER, "RUN") if "pip install" in rest]
    return run


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A folder with an engine's metadata, which is all that an editable install has of it, too."""
    for name, version in ENGINE.items():
        path = _metadata(tmp_path, name)
        path.parent.mkdir(parents=True)
        path.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "sglang-alloc").mkdir()
    return tmp_path


def _metadata(folder: Path, name: str) -> Path:
    return folder / "packages" / f"{name.replace('-', '_')}-{ENGINE[name]}.dist-info" / "METADATA"


def _build(folder: Path, pip: str = "true") -> subprocess.CompletedProcess[str]:
    """Run the guard among the packages of `folder`, with a shell command in place of pip."""
    python = folder / "bin" / "python3"
    python.parent.mkdir()
    # -S leaves out the packages of the machine that runs this test.
    otherwise = f'exec {sys.executable} -S "$@"'
    python.write_text(f'#!/bin/sh\ncase "$*" in "-m pip "*) {pip} ;; *) {otherwise} ;; esac\n')
    python.chmod(0o755)
    return subprocess.run(
        ["sh", "-c", _guard().replace("/tmp/", f"{folder}/")],
        env={"PATH": f"{python.parent}:{os.defpath}", "PYTHONPATH": str(folder / "packages")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_workers_build_passes_where_the_engine_stays_as_it_is(engine: Path) -> None:
    assert _build(engine).returncode == 0
    assert not (engine / "sglang-alloc").exists()


@pytest.mark.parametrize("name", ENGINE)
def test_workers_build_fails_where_a_package_of_the_engine_moves(engine: Path, name: str) -> None:
    result = _build(engine, f"sed -i 's/^Version: .*/Version: 9.9.9/' {_metadata(engine, name)}")
    assert result.returncode != 0
    assert f"> {name} 9.9.9" in result.stdout


@pytest.mark.parametrize("name", ENGINE)
def test_workers_build_fails_where_a_package_of_the_engine_is_not_there(
    engine: Path, name: str
) -> None:
    _metadata(engine, name).unlink()
    _metadata(engine, name).parent.rmdir()
    result = _build(engine)
    assert result.returncode != 0
    assert f"No package metadata was found for {name}" in result.stderr


def test_workers_user_has_the_home_and_the_caches_that_the_chart_gives_it() -> None:
    (variables,) = _values(WORKER, "ENV")
    caches = dict(pair.split("=") for pair in variables.split())
    of_chart = {each["name"]: each.get("value") for each in container(render(), "sglang")["env"]}
    assert caches.items() <= of_chart.items()
    assert {"HOME", "USER", "TRITON_CACHE_DIR"} <= set(caches)
    assert f"install -d -m 1777 {caches['HOME']}" in _values(WORKER, "RUN")


def test_controllers_default_command_reads_the_file_that_the_chart_mounts() -> None:
    (command,) = _values(FOLDER / "controller.Dockerfile", "CMD")
    assert "/etc/sglang-alloc/controller.yaml" in command
