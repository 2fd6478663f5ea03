"""A small HTTP server that serves recorded SGLang metrics, and misbehaves on demand.

It stands in for SGLang where a test needs a fault - a hang, garbage, a 500, a restart - that the
real server cannot be asked for. It runs in a thread of the test's process.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandInServer:
    """Serves `page` at /metrics and `loads` at /v1/loads in the manner of `fault`."""

    def __init__(self, page: str = "", port: int = 0) -> None:
        self.page = page
        self.loads: str | None = None
        """None: not found there, as with a server that does not offer it."""
        self.fault = "none"
        self.requests = 0
        self.stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _request_class(self))
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(page: str = "", port: int = 0) -> Iterator[StandInServer]:
    """Serve until the end of the block."""
    server = StandInServer(page, port)
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _request_class(stand_in: StandInServer) -> type[BaseHTTPRequestHandler]:
    class Request(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_loads = self.path.startswith("/v1/loads")
            if is_loads and stand_in.loads is None:
                self.send_error(404)
                return
            stand_in.requests += not is_loads
            with suppress(OSError):  # A client that has given up waiting is no fault here.
                self._answer()

        def _answer(self) -> None:
            body = b"\xff\x00 not metrics" if stand_in.fault == "garbage" else b""
            is_loads = self.path.startswith("/v1/loads")
            body = body or ((is_loads and stand_in.loads) or stand_in.page).encode()
            if stand_in.fault == "hang":
                stand_in.stopping.wait(60)
                return
            if stand_in.fault == "cut":
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if stand_in.fault == "drip headers":
                self._drip(b"HTTP/1.0 200 OK\r\nX-Drip: " + 600 * b"x" + b"\r\n\r\n")
                return
            self.send_response(500 if stand_in.fault == "error" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if stand_in.fault == "drip":
                self._drip(body)
            else:
                self.wfile.write(body)

        def _drip(self, body: bytes) -> None:
            for index in range(len(body)):
                if stand_in.stopping.is_set():
                    return
                self.wfile.write(body[index : index + 1])
                self.wfile.flush()
                time.sleep(0.02)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Request
