"""Control story, beside every step: /metrics, /livez and /readyz over HTTP."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.settings import HttpSettings

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PLAIN_TYPE = "text/plain; charset=utf-8"
# A client that opens a connection and says nothing holds a thread for this long.
_CLIENT_TIMEOUT_SECONDS = 5.0


class Health(NamedTuple):
    """An answer to a probe."""

    ok: bool
    sentence: str


class MetricsServer:
    """A small HTTP server in daemon threads, for scrapers and probes only."""

    def __init__(
        self,
        settings: HttpSettings,
        metrics_text: Callable[[], bytes],
        live: Callable[[], Health],
        ready: Callable[[], Health],
    ) -> None:
        """Bind the address.

        Raises:
            ConfigurationError: the address cannot be bound, for example because it is in use.
        """
        routes: dict[str, Callable[[], tuple[int, str, bytes]]] = {
            "/metrics": lambda: (200, _METRICS_TYPE, metrics_text()),
            "/livez": lambda: _probe(live()),
            "/readyz": lambda: _probe(ready()),
        }
        try:
            self._server = ThreadingHTTPServer(
                (settings.host, settings.port), _request_class(routes)
            )
        except OSError as error:
            raise ConfigurationError(
                f"The controller cannot serve its metrics on http.host {settings.host}, http.port "
                f"{settings.port}: {error.strerror}. Choose another port, or 0 for a free one."
            ) from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]

    def start(self) -> None:
        """Answer requests from now on."""
        threading.Thread(
            target=self._server.serve_forever, name="metrics-server", daemon=True
        ).start()

    def stop(self) -> None:
        """Stop answering and free the port; `start` must have been called."""
        self._server.shutdown()
        self._server.server_close()


def _probe(health: Health) -> tuple[int, str, bytes]:
    return (200 if health.ok else 503), _PLAIN_TYPE, f"{health.sentence}\n".encode()


def _request_class(
    routes: dict[str, Callable[[], tuple[int, str, bytes]]],
) -> type[BaseHTTPRequestHandler]:
    class Request(BaseHTTPRequestHandler):
        timeout = _CLIENT_TIMEOUT_SECONDS

        def do_GET(self) -> None:
            route = routes.get(self.path.split("?", 1)[0])
            if route is None:
                self.send_error(404, "Try /metrics, /livez or /readyz")
                return
            status, content_type, body = route()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent: scrapes are no news."""

    return Request
