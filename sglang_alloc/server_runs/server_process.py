"""A real SGLang server, ready to answer, stopped when the block ends."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import httpx2

from sglang_alloc.server_runs.errors import NotReadyError, ServerRunError
from sglang_alloc.server_runs.owned_process import (
    STOP_GRACE_SECONDS,
    OwnedProcess,
    owned_process,
)

if TYPE_CHECKING:
    from typing import Required, Unpack  # Python 3.11; annotations here are not evaluated

# SGLang on a machine without a GPU; more KV memory than this only makes the start longer.
CPU_ARGUMENTS = (
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--mem-fraction-static", "0.1"),
    "--enable-metrics",
)
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    # OpenMP threads that spin at their barriers starve whatever shares the cores: on two busy cores
    # eight clients got 0.2 requests/s with endless spinning. Not spinning at all costs a third on
    # quiet ones (4.2 requests/s instead of 7.0), this short spin a tenth (6.3).
    "GOMP_SPINCOUNT": "5000",
}
# SGLang looks every five seconds whether it was told to stop, and then waits for its schedulers to
# release a GPU: 12 s on two cores. On a CPU they hold nothing that does not end with them.
STOP_GRACE_ON_CPU_SECONDS = 0.0
READY_TIMEOUT_SECONDS = 240.0
_POLL_SECONDS = 0.25

OnWait = Callable[[str], None]


@dataclass(frozen=True)
class Server:
    """An SGLang server: its base URL, its process, and its shared table (None: stock)."""

    url: str
    process: OwnedProcess
    table: Path | None

    @property
    def health_url(self) -> str:
        """What answers 200 as soon as requests are served."""
        return f"{self.url}/health"


class ServerOptions(TypedDict, total=False):
    """How a server is started.

    With a `table` it is started by `sglang-alloc serve`, else it is stock SGLang and the plugin
    stays inert. It runs on the CPU unless `on_cpu` is false: SGLang then takes the device of
    `extra_args`, or the one that it finds. `extra_args` are SGLang's own and may repeat a default
    (the last one counts); `env` is added to the environment; without a `port` one is chosen.
    """

    log_path: Required[Path]
    table: Path | None
    mode: str | None
    extra_args: Sequence[str]
    on_cpu: bool
    env: Mapping[str, str] | None
    port: int | None


@contextlib.contextmanager
def serve(
    model_path: Path,
    *,
    ready_timeout_seconds: float = READY_TIMEOUT_SECONDS,
    on_wait: OnWait | None = None,
    **options: Unpack[ServerOptions],
) -> Iterator[Server]:
    """Start SGLang for `model_path`, wait until it answers, stop its process group at the end.

    `on_wait` is called several times a second with a line about the wait.
    Raises ProcessDiedError or NotReadyError, both with the last lines of the log.
    """
    with started_server(model_path, **options) as server:
        wait_until_ready(server.process, server.health_url, ready_timeout_seconds, on_wait)
        yield server


@contextlib.contextmanager
def started_server(model_path: Path, **options: Unpack[ServerOptions]) -> Iterator[Server]:
    """Start SGLang for `model_path` without waiting; stop its process group at the end."""
    table, on_cpu = options.get("table"), options.get("on_cpu", True)
    port = options.get("port") or free_port()
    command = server_command(
        model_path,
        port,
        table=table,
        mode=options.get("mode"),
        extra_args=options.get("extra_args", ()),
        on_cpu=on_cpu,
    )
    environment = {**(CPU_ENVIRONMENT if on_cpu else {}), **(options.get("env") or {})}
    grace_seconds = STOP_GRACE_ON_CPU_SECONDS if on_cpu else STOP_GRACE_SECONDS
    with owned_process(
        "SGLang",
        command,
        log_path=options["log_path"],
        env=environment,
        stop_grace_seconds=grace_seconds,
    ) as process:
        yield Server(f"http://127.0.0.1:{port}", process, table)


def server_command(
    model_path: Path,
    port: int,
    *,
    table: Path | None,
    mode: str | None,
    extra_args: Sequence[str],
    on_cpu: bool = True,
) -> list[str]:
    """Return the command line: stock SGLang, or `sglang-alloc serve` in front of it."""
    device_arguments = CPU_ARGUMENTS if on_cpu else ("--enable-metrics",)
    arguments = ["--model-path", str(model_path), "--port", str(port)]
    arguments += [*device_arguments, *extra_args]
    if table is None:
        return [sys.executable, "-m", "sglang.launch_server", *arguments]
    chosen_mode = [] if mode is None else ["--mode", mode]
    serve_command = [console_script("sglang-alloc"), "serve", "--table", str(table), *chosen_mode]
    return [*serve_command, "--", *arguments]


def console_script(name: str) -> str:
    """Return the path of an installed command beside this interpreter."""
    script = Path(sys.executable).parent / name
    if not script.exists():
        raise ServerRunError(
            f"the command {name} should be beside {sys.executable} and is not: "
            "install this project into that environment (`pip install .`)"
        )
    return str(script)


def wait_until_ready(
    process: OwnedProcess, health_url: str, timeout_seconds: float, on_wait: OnWait | None = None
) -> None:
    """Poll `health_url` until it answers 200; raise when the process ends or the time is over."""
    started = time.monotonic()
    with httpx2.Client(timeout=2.0, trust_env=False) as client:
        while not _answers(client, health_url):
            process.require_alive()
            waited_seconds = time.monotonic() - started
            if on_wait is not None:
                on_wait(f"not ready after {waited_seconds:.0f} s, see {process.log_path}")
            if waited_seconds > timeout_seconds:
                raise NotReadyError(
                    f"{process.name} did not answer {health_url} within {timeout_seconds:.0f} s. "
                    f"Its log ({process.log_path}) ends with:\n{process.log_tail()}"
                )
            time.sleep(_POLL_SECONDS)


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(client: httpx2.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx2.TransportError:
        return False
