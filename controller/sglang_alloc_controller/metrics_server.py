"""Control story, beside every step: the controller over HTTP, to look at and to order about."""

import contextlib
import json
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import structlog

from sglang_alloc.errors import AllocError, ConfigurationError
from sglang_alloc_controller.http_permit import Header, Refusal
from sglang_alloc_controller.settings import HttpSettings

PLAIN_TYPE = "text/plain; charset=utf-8"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
JSON_TYPE = "application/json"
HTML_TYPE = "text/html; charset=utf-8"
# A client that opens a connection and says nothing holds a thread for this long.
_CLIENT_TIMEOUT_SECONDS = 5.0
# Threads and file descriptors that clients may hold: scrapers and people need a handful at once.
_CONNECTIONS_MAX = 64
_ORDER_MAX_BYTES = 4096
_log = structlog.get_logger("sglang_alloc_controller")
# The page brings everything along, so a browser may fetch nothing but its data.
_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
)


class Health(NamedTuple):
    """An answer to a probe."""

    ok: bool
    sentence: str

    def answer(self) -> "Answer":
        """Return it as the probe wants it."""
        return Answer(200 if self.ok else 503, PLAIN_TYPE, f"{self.sentence}\n".encode())


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    content_type: str
    body: bytes

    @classmethod
    def of_json(cls, status: int, content: Mapping[str, object]) -> "Answer":
        """Return the answer that holds this JSON object."""
        return cls(status, JSON_TYPE, json.dumps(content).encode() + b"\n")


Page = Callable[[Mapping[str, str]], Answer]
Order = Callable[[Mapping[str, Any]], Answer]


class Routes(NamedTuple):
    """What is served: pages by GET, with the query; orders by POST, with a JSON object."""

    pages: Mapping[str, Page]
    orders: Mapping[str, Order]
    refusal: Callable[[Header], Refusal | None]
    """Tells from the headers why an order is refused; None: it is not."""


class _Server(ThreadingHTTPServer):
    """Answers each connection in a thread; one too many ends the one that is open longest.

    So clients that are slow on purpose, or many, cannot keep a probe or an order out, nor use up
    the threads and file descriptors that the controller itself needs.
    """

    daemon_threads = True
    request_queue_size = _CONNECTIONS_MAX

    def __init__(self, host: str, port: int, requests: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._open: dict[Any, None] = {}  # in the order in which they came
        self._lock = threading.Lock()
        super().__init__((host, port), requests)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = None
            if len(self._open) > _CONNECTIONS_MAX:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a fault of ours; a client that has gone away is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            _log.warning("request_failed", exc_info=True)

    def server_bind(self) -> None:
        # HTTPServer asks for the name of its own address here, and waits for a name server that a
        # cluster without one does not have.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]


class MetricsServer:
    """A small HTTP server in daemon threads, for scrapers, probes and people."""

    def __init__(self, settings: HttpSettings, routes: Routes) -> None:
        """Bind the address.

        Raises:
            ConfigurationError: the address cannot be bound, for example because it is in use.
        """
        self._server = _bound(settings, _request_class(routes))
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


def require_free(settings: HttpSettings) -> None:
    """Raise a ConfigurationError unless the address can be bound now."""
    _bound(settings, BaseHTTPRequestHandler).server_close()


def _bound(settings: HttpSettings, requests: type[BaseHTTPRequestHandler]) -> _Server:
    try:
        return _Server(settings.host, settings.port, requests)
    except OSError as error:
        raise ConfigurationError(
            f"The controller cannot serve its metrics on http.host {settings.host}, http.port "
            f"{settings.port}: {error.strerror}. Choose another port, or 0 for a free one."
        ) from error


def _problem(status: int, sentence: str) -> Answer:
    return Answer.of_json(status, {"ok": False, "problem": sentence})


def _show(page: Page, query: Mapping[str, str]) -> Answer:
    try:
        return page(query)
    except Exception:
        _log.warning("page_failed", exc_info=True)
        return Answer(500, PLAIN_TYPE, b"This failed; the controller's log has the traceback.\n")


def _obey(order: Order, content_type: str, body: bytes) -> Answer:
    # A form of a foreign web page cannot send this type without the browser asking first.
    if content_type.partition(";")[0].strip() != JSON_TYPE:
        return _problem(415, f"Send Content-Type: {JSON_TYPE}.")
    try:
        content = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return _problem(400, "The body is not JSON.")
    if not isinstance(content, dict):
        return _problem(400, "The body must be a JSON object.")
    try:
        return order(content)
    except AllocError as error:
        return _problem(409, str(error))
    except Exception as error:
        # Whoever gives an order, in an emergency too, must hear what became of it.
        _log.warning("order_failed", exc_info=True)
        sentence = "The order failed by a fault of the controller; its log has the traceback."
        return _problem(500, f"{sentence} ({type(error).__name__})")


def _request_class(routes: Routes) -> type[BaseHTTPRequestHandler]:
    class Request(BaseHTTPRequestHandler):
        timeout = _CLIENT_TIMEOUT_SECONDS

        def do_GET(self) -> None:
            path, query = self._target()
            page = routes.pages.get(path)
            if page is None:
                self.send_error(404, f"Try {', '.join(routes.pages)}")
                return
            self._send(_show(page, query))

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            order = routes.orders.get(self._target()[0])
            if order is None:
                self._send(_problem(404, f"Orders go to {', '.join(routes.orders)}."))
                return
            refusal = routes.refusal(self._header)
            if refusal is not None:
                self._send(_problem(*refusal))
                return
            length = self._header("Content-Length").lstrip("0") or "0"
            # The length of the number first: Python converts no number of thousands of digits.
            if not length.isdecimal() or len(length) > 9 or int(length) > _ORDER_MAX_BYTES:
                self._send(_problem(413, f"Send at most {_ORDER_MAX_BYTES} bytes."))
                return
            body = self.rfile.read(int(length))
            self._send(_obey(order, self._header("Content-Type"), body))

        def _target(self) -> tuple[str, dict[str, str]]:
            """Return path and query, "" for what is no address."""
            try:
                parts = urlsplit(self.path)
                return parts.path, dict(parse_qsl(parts.query))
            except ValueError:
                return "", {}

        def _header(self, name: str) -> str:
            return str(self.headers.get(name, ""))

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(answer.body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if answer.content_type == HTML_TYPE:
                self.send_header("Content-Security-Policy", _PAGE_POLICY)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent: scrapes are no news."""

    return Request
