"""A real Prometheus that scrapes once a second, and that a test pauses, kills and starts again."""

import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml
from stand_in_server import free_port

PATIENCE_SECONDS = 60.0


class PrometheusProcess:
    """Prometheus in `folder`, scraping these ports of this machine by the name of their job."""

    def __init__(self, folder: Path, ports: Mapping[str, int]) -> None:
        binary = shutil.which("prometheus")
        assert binary, "This test needs a Prometheus server: apt-get install -y prometheus"
        scrapes = [
            {
                "job_name": job,
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
            }
            for job, port in ports.items()
        ]
        config, port = folder / "prometheus.yml", free_port()
        config.write_text(yaml.safe_dump({"scrape_configs": scrapes}))
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "prometheus.log"
        self._command = [
            binary,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        self.start()

    def start(self) -> None:
        """Start it, again on the same port and the same storage after a kill."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def pause(self) -> None:
        """Stop it from doing anything, as a machine out of memory would."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait(PATIENCE_SECONDS)


@contextmanager
def scraping(folder: Path, **ports: int) -> Iterator[PrometheusProcess]:
    """Run a Prometheus until the end of the block."""
    prometheus = PrometheusProcess(folder, ports)
    try:
        yield prometheus
    finally:
        prometheus.kill()
