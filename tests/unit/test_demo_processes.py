"""Processes that the demo starts: watched, stopped with everything they started, explained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from sglang_alloc.server_runs.errors import NotReadyError, ProcessDiedError, ServerRunError
from sglang_alloc.server_runs.owned_process import owned_process, pause_group, resume_group
from sglang_alloc.server_runs.server_process import (
    console_script,
    free_port,
    server_command,
    wait_until_ready,
)

# A parent that ignores SIGTERM, and whose child does so too.
_STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _first_line(log_path: Path) -> str:
    return wait_until(log_path.read_text, "a line in the log").splitlines()[0]


def _state(pid: int) -> str:
    """Return the letter that Linux has for what a process does."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _is_running(pid: int) -> bool:
    try:
        state = _state(pid)
    except OSError:
        return False
    return state != "Z"


def test_the_whole_group_is_gone_after_the_block_even_when_it_ignores_sigterm(
    tmp_path: Path,
) -> None:
    log_path = tmp_path / "log"
    with owned_process(
        "stubborn", _python(_STUBBORN), log_path=log_path, stop_grace_seconds=0.2
    ) as process:
        child = int(_first_line(log_path))
        assert _is_running(child)
    assert not _is_running(process.pid)
    assert not _is_running(child)


def test_an_exception_in_the_block_stops_the_process_too(tmp_path: Path) -> None:
    sleeper = owned_process("s", _python("import time; time.sleep(60)"), log_path=tmp_path / "log")
    with pytest.raises(KeyboardInterrupt), sleeper as process:
        raise KeyboardInterrupt
    assert not _is_running(process.pid)


def test_a_process_that_died_is_reported_with_its_last_words(tmp_path: Path) -> None:
    command = _python("print('first'); raise SystemExit('no such model: caf\\u00e9')")
    with owned_process("SGLang", command, log_path=tmp_path / "log") as process:
        process.popen.wait()
        with pytest.raises(ProcessDiedError, match=r"(?s)exit status 1.*no such model: caf"):
            process.require_alive()


def test_a_command_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    with owned_process("x", ["/nonexistent/program"], log_path=tmp_path / "log") as process:
        process.popen.wait()
        with pytest.raises(ProcessDiedError, match="cannot be started: No such file"):
            process.require_alive()


def test_waiting_ends_when_the_process_dies(tmp_path: Path) -> None:
    with (
        owned_process("SGLang", _python("exit(3)"), log_path=tmp_path / "log") as process,
        pytest.raises(ProcessDiedError, match="exit status 3"),
    ):
        wait_until_ready(process, f"http://127.0.0.1:{free_port()}/health", 30.0)


def test_waiting_ends_when_the_time_is_over(tmp_path: Path) -> None:
    with owned_process(
        "SGLang", _python("import time; time.sleep(60)"), log_path=tmp_path / "log"
    ) as process:
        waits: list[str] = []
        with pytest.raises(NotReadyError, match="did not answer"):
            wait_until_ready(process, f"http://127.0.0.1:{free_port()}/health", 0.1, waits.append)
        assert "not ready after" in waits[0]


def test_a_child_dies_with_a_starter_that_is_killed(tmp_path: Path) -> None:
    starter = (
        "import pathlib, sys\n"
        "from sglang_alloc.server_runs.owned_process import owned_process\n"
        "code = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "log = pathlib.Path(sys.argv[1])\n"
        "with owned_process('child', [sys.executable, '-c', code], log_path=log):\n"
        "    sys.stdin.read()\n"
    )
    log_path = tmp_path / "log"
    log_path.touch()
    process = subprocess.Popen(
        [*_python(starter), str(log_path)], stdin=subprocess.PIPE, cwd=tmp_path
    )
    child = int(_first_line(log_path))
    process.kill()
    process.communicate()
    wait_until(lambda: not _is_running(child), "the child is gone")


def test_a_paused_group_takes_no_time_and_can_still_be_stopped(tmp_path: Path) -> None:
    with owned_process(
        "s", _python("import time; time.sleep(60)"), log_path=tmp_path / "log"
    ) as process:
        pause_group(process)
        wait_until(lambda: _state(process.pid) == "T", "the process is stopped")
        resume_group(process)
        pause_group(process)
    assert not _is_running(process.pid)


def test_a_server_without_a_table_is_stock_sglang() -> None:
    command = server_command(
        Path("model"), 1234, table=None, mode=None, extra_args=["--dtype", "float32"]
    )
    assert command[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert command[-2:] == ["--dtype", "float32"]


def test_a_server_with_a_table_starts_through_our_command() -> None:
    command = server_command(Path("model"), 1234, table=Path("t.tbl"), mode="layer", extra_args=[])
    assert [os.path.basename(command[0]), *command[1:6]] == [
        "sglang-alloc",
        "serve",
        "--table",
        "t.tbl",
        "--mode",
        "layer",
    ]
    assert command[6] == "--"
    assert command[command.index("--port") + 1] == "1234"


def test_a_command_that_is_not_installed_is_named() -> None:
    with pytest.raises(ServerRunError, match=r"no-such-command.*pip install"):
        console_script("no-such-command")
