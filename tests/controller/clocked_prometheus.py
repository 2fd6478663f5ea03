"""A stand-in for Prometheus whose clock a test sets: it scrapes, keeps and answers as the real one.

The real one takes its machine's clock, which no test may set. Like it, this one refuses a sample
that is not later than the last of its series, and a query sees none that is later than its clock.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

REQUESTS_PER_SECOND = 10
SCRAPE_SECONDS, LOOKBACK_SECONDS = 2, 30.0
_EPOCH_SECONDS = 1_790_000_000.0


class ClockedPrometheus:
    """Watches a server that has answered `REQUESTS_PER_SECOND` requests a second from time 0 on."""

    def __init__(self) -> None:
        self.url = ""
        self.now_seconds = 0.0
        """True time, which the monotonic clock of the controller shows."""
        self.after_telling_the_time: Callable[[], None] = lambda: None
        self._set_by_seconds = 0.0
        self._samples: list[tuple[float, float]] = []

    def set_clock(self, by_seconds: float) -> None:
        """Set its clock forward, or back."""
        self._set_by_seconds += by_seconds

    def pass_second(self) -> None:
        self.now_seconds += 1.0
        if self.now_seconds % SCRAPE_SECONDS == 0:
            self.scrape()

    def scrape(self) -> None:
        at = self._its_seconds()
        if not self._samples or at > self._samples[-1][0]:
            self._samples.append((at, REQUESTS_PER_SECOND * self.now_seconds))

    def answer(self, expression: str) -> str:
        """Return what its API answers to this query."""
        its_seconds = self._its_seconds()
        if expression == "time()":
            self.after_telling_the_time()
            return _success([its_seconds, str(its_seconds)])
        begins = its_seconds - LOOKBACK_SECONDS
        seen = [one for one in self._samples if begins < one[0] <= its_seconds]
        counted = [[at, str(answered)] for at, answered in seen]
        running = [[at, "1"] for at, _ in seen]
        series = {
            "num_queue_reqs": {},
            "num_running_reqs": {},
            "time_to_first_token_seconds_bucket": {"le": "+Inf"},
        }
        result = [
            {
                "metric": {"__name__": f"sglang:{name}", **labels},
                "values": counted if labels else running,
            }
            for name, labels in series.items()
        ]
        return _success(result if seen else [])

    def _its_seconds(self) -> float:
        return _EPOCH_SECONDS + self.now_seconds + self._set_by_seconds


@contextmanager
def clocked_prometheus() -> Iterator[ClockedPrometheus]:
    """Serve its API until the end of the block."""
    prometheus = ClockedPrometheus()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _request_class(prometheus))
    server.daemon_threads = True
    prometheus.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield prometheus
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _success(result: list[object]) -> str:
    return json.dumps({"status": "success", "data": {"result": result}})


def _request_class(prometheus: ClockedPrometheus) -> type[BaseHTTPRequestHandler]:
    class Request(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            (expression,) = parse_qs(urlsplit(self.path).query)["query"]
            body = prometheus.answer(expression).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Request
