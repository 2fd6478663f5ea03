"""`sglang-alloc-controller` as a real process."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import yaml
from stand_in_server import free_port
from waiting import PATIENCE_SECONDS, wait_until

EXECUTABLE = Path(sys.executable).with_name("sglang-alloc-controller")


def write_config(folder: Path, url: str, **sections: Any) -> Path:
    """Write a configuration for the table `folder`/t.tbl with quick limits.

    The time limit of a reading is long, because a busy test machine may be slow to answer.
    """
    content = {
        "table": str(folder / "t.tbl"),
        "tick_seconds": 0.1,
        "source": {"url": url, "poll_seconds": 0.1, "timeout_seconds": 5.0},
        "slo": {"ttft_seconds": 1.0, "itl_seconds": 0.05},
        "law": {"degrade_hold_seconds": 0.3, "dead_time_seconds": 0.0, "idle_ramp_seconds": 1.0},
        "freshness": {
            "stale_after_seconds": 2.0,
            "hold_seconds": 1.0,
            "ramp_seconds": 1.0,
            "warmup_seconds": 0.0,
            "idle_after_seconds": 60.0,
        },
        "http": {"port": free_port()},
        **sections,
    }
    path = folder / "controller.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the controller's to its end."""
    return subprocess.run(
        [EXECUTABLE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


class ControllerProcess:
    """A running controller and its metrics."""

    def __init__(self, config: Path, *arguments: str, log: int | None = None) -> None:
        self._port = yaml.safe_load(config.read_text())["http"]["port"]
        self._log = config.with_suffix(".log").open("ab")
        self._log_path = config.with_suffix(".log")
        self.process = subprocess.Popen(
            [EXECUTABLE, "run", "--config", config, *arguments],
            stderr=self._log if log is None else log,
            stdout=self._log,
            start_new_session=True,
        )

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(f"http://127.0.0.1:{self._port}{path}", timeout=10)

    def order(self, path: str, **content: Any) -> httpx2.Response:
        return httpx2.post(f"http://127.0.0.1:{self._port}{path}", json=content, timeout=10)

    @property
    def page_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    def has(self, series: str) -> bool:
        """Tell whether this line is in the metrics; a controller that starts has none yet."""
        try:
            return series in self.get("/metrics").text.splitlines()
        except httpx2.HTTPError:
            return False

    def value(self, name: str) -> float:
        """Return the value of a series without labels; a controller that starts has none yet."""
        lines = self.get("/metrics").text.splitlines()
        prefix = f"sglang_alloc_controller_{name} "
        return next((float(line.split()[1]) for line in lines if line.startswith(prefix)), 0.0)

    def is_in_state(self, state: str) -> bool:
        return self.has(f'sglang_alloc_controller_input_state{{state="{state}"}} 1.0')

    def wait_for(self, fact: Callable[[], bool], what: str) -> None:
        """Wait until `fact` holds; fail with the log when it does not come."""

        def has_come() -> bool:
            ended = self.process.poll()
            assert ended is None, f"the controller ended ({ended}): {self.log()}"
            return fact()

        wait_until(has_come, what, explain=self.log)

    def log(self) -> str:
        return self._log_path.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(PATIENCE_SECONDS)
        self._log.close()


@contextmanager
def running(config: Path, *arguments: str, log: int | None = None) -> Iterator[ControllerProcess]:
    """Run a controller until the end of the block; it logs to a file of its own, or to `log`."""
    controller = ControllerProcess(config, *arguments, log=log)
    try:
        yield controller
    finally:
        controller.close()
