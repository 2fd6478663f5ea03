"""Own a process group for as long as a block runs and leave nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_alloc.server_runs.errors import ProcessDiedError

# SGLang drains for a moment after SIGTERM; what is still there after this is killed.
STOP_GRACE_SECONDS = 8.0
TAIL_LINES = 15


@dataclass(frozen=True)
class OwnedProcess:
    """A running child, the leader of its own process group, whose output goes to `log_path`."""

    name: str
    popen: subprocess.Popen[bytes]
    log_path: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def require_alive(self) -> None:
        """Raise ProcessDiedError with the last log lines when the child has ended by itself."""
        code = self.popen.poll()
        if code is None:
            return
        raise ProcessDiedError(
            f"{self.name} ended by itself with exit status {code}. The last lines of its log "
            f"({self.log_path}) say why:\n{self.log_tail()}"
        )

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """Return the last log lines, indented; undecodable bytes are replaced."""
        text = self.log_path.read_bytes()[-65536:].decode("utf-8", errors="replace")
        kept = [line for line in text.splitlines() if line.strip()][-lines:]
        return "\n".join(f"    {line}" for line in kept) or "    (the log is empty)"


@contextlib.contextmanager
def owned_process(
    name: str,
    command: Sequence[str],
    *,
    log_path: Path,
    env: Mapping[str, str] | None = None,
    stop_grace_seconds: float = STOP_GRACE_SECONDS,
) -> Iterator[OwnedProcess]:
    """Run `command` in a process group of its own; stop the whole group when the block ends.

    `env` is added to this process's environment. The block may end by returning, by an exception
    or by Ctrl-C; should this process itself be killed, the kernel stops the child (Linux).
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", "sglang_alloc.server_runs.bound_exec", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    try:
        yield OwnedProcess(name, popen, log_path)
    finally:
        _stop_group(popen, stop_grace_seconds)


def _stop_group(popen: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """SIGTERM the leader, wait, then SIGKILL whatever is left of its group."""
    _signal_group_leader(popen, signal.SIGCONT)  # a paused process would not hear the SIGTERM
    _signal_group_leader(popen, signal.SIGTERM)
    try:
        popen.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        pass
    except KeyboardInterrupt:  # an impatient second Ctrl-C: skip the grace, still stop it all
        pass
    finally:
        _kill_group(popen.pid)
        popen.wait()
        _await_group_end(popen.pid)


def _signal_group_leader(popen: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if popen.poll() is None:
        popen.send_signal(number)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _await_group_end(group: int, timeout_seconds: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)


def pause_group(process: OwnedProcess) -> None:
    """Stop every process of the group, so that it takes no CPU time while another is measured."""
    os.killpg(process.pid, signal.SIGSTOP)


def resume_group(process: OwnedProcess) -> None:
    """Let a paused group run again."""
    os.killpg(process.pid, signal.SIGCONT)
