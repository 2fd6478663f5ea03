"""Both command lines with output that is closed, full, cut off or ASCII: no traceback, ever."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from table_factory import publish_and_open

CLIS = {"sglang_alloc.cli": "version", "sglang_alloc_controller.cli": "schema"}


def _run(module: str, *arguments: str, redirect: str) -> subprocess.CompletedProcess[str]:
    code = f"from {module} import main; main()"
    quoted = " ".join(f"'{argument}'" for argument in arguments)
    return subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{code}' {quoted} {redirect}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )


@pytest.mark.parametrize(("module", "command"), CLIS.items())
def test_a_full_disk_is_one_sentence(module: str, command: str) -> None:
    result = _run(module, command, redirect=">/dev/full")
    assert result.returncode == 74
    assert result.stderr.count("\n") == 1
    assert "output cannot be written: No space left on device" in result.stderr


@pytest.mark.parametrize(("module", "command"), CLIS.items())
def test_closed_output_is_no_error(module: str, command: str) -> None:
    result = _run(module, command, redirect=">&-")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("module", "command"), CLIS.items())
def test_without_standard_error_a_refusal_is_an_exit_status_and_no_traceback(
    module: str, command: str
) -> None:
    result = _run(module, command, "--no-such-option", redirect="2>&-")
    assert (result.returncode, result.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "redirect", "status"),
    [((), ">/dev/full", 74), (("--json",), ">/dev/full", 74), ((), ">&-", 0), ((), "", 0)],
)
def test_status_bears_odd_output(
    tmp_path: Path, arguments: tuple[str, ...], redirect: str, status: int
) -> None:
    table = publish_and_open(tmp_path / "tiny.tbl")
    table.set_override(5, 5, time.monotonic_ns() + 60 * 10**9, "jürgen")
    path = str(table.path)
    result = _run(
        "sglang_alloc.cli", "status", "--shared-path", path, *arguments, redirect=redirect
    )
    assert result.returncode == status
    assert "Traceback" not in result.stderr
    if not redirect:
        assert "j\\xfcrgen" in result.stdout


def test_closed_output_does_not_land_in_the_table(tmp_path: Path) -> None:
    """The next file that a process opens gets the number of one that is closed."""
    table = publish_and_open(tmp_path / "tiny.tbl")
    before = table.path.read_bytes()
    _run("sglang_alloc.cli", "status", "--shared-path", str(table.path), redirect="<&- >&- 2>&-")
    assert table.path.read_bytes() == before


@pytest.mark.parametrize(("module", "command"), CLIS.items())
def test_a_reader_that_has_gone_away_hears_nothing(module: str, command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from {module} import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, command], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert result.returncode != 0
    assert result.stderr == b""
