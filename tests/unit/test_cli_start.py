"""The command line as a process: help answers without the heavy imports, errors are a sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "sglang", "numpy", "triton", "httpx2", "matplotlib"}


def _run(*arguments: str, imports: bool = False) -> subprocess.CompletedProcess[str]:
    options = ["-X", "importtime"] if imports else []
    command = [sys.executable, *options, "-m", "sglang_alloc.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command", [[], ["serve"], ["bench"], ["publish"], ["status"], ["set"], ["version"]]
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    result = _run(*command, "--help", imports=True)
    assert result.returncode == 0
    imported = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & HEAVY


def test_help_lists_every_command() -> None:
    listed = _run("--help").stdout
    assert all(name in listed for name in ("serve", "bench", "publish", "status", "set", "version"))


def test_an_error_is_one_sentence_on_stderr_and_status_one(tmp_path: Path) -> None:
    path = tmp_path / "absent.tbl"
    result = _run("status", "--shared-path", str(path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: There is no shared table at {path}.")
    assert "Traceback" not in result.stderr


def test_version_names_what_a_bug_report_needs() -> None:
    lines = _run("version").stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == ["sglang-alloc", "sglang", "torch", "numpy", "python"]
    assert all(len(line.split()) >= 2 for line in lines)
