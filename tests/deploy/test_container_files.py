"""The container files, linted by reading: there is no engine here that could build them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from chart_render import CHART, REPOSITORY

FOLDER = REPOSITORY / "deploy" / "container"
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
    path = FOLDER / "worker.Dockerfile"
    assert _values(path, "FROM") == ["${SGLANG_IMAGE}"]
    (run,) = _values(path, "RUN")
    before, install, after = run.index("> /tmp/before"), run.index("pip install"), run.index("diff")
    assert before < install < after


def test_controllers_default_command_reads_the_file_that_the_chart_mounts() -> None:
    (command,) = _values(FOLDER / "controller.Dockerfile", "CMD")
    assert "/etc/sglang-alloc/controller.yaml" in command
