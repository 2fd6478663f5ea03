"""A stand-in for SGLang's streaming /generate: the real protocol, made-up tokens, no model.

What the load generator measures on the real server is tested in tests/integration; this one makes
the failures that a healthy server does not make: an error status, a silent connection, a short
answer, an aborted request, garbage.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS_PER_CHUNK = 1


class _Generate(BaseHTTPRequestHandler):
    """What to do is the first word of the prompt; anything else is answered in full.

    A request that hangs does so until another one says `release`, or until the server stops.
    """

    released: threading.Event

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wanted = int(body["sampling_params"]["max_new_tokens"])
        behaviour = body["text"].split(" ")[0]
        if behaviour == "refuse":
            self.send_error(503, "no capacity")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if behaviour == "hang":
            self.released.wait(120)
            return
        if behaviour == "release":
            self.released.set()
        if behaviour == "garbage":
            self._send("not json")
            return
        produced = wanted - 1 if behaviour == "short" else wanted
        step = 2 if behaviour == "pairs" else TOKENS_PER_CHUNK
        for tokens in range(1, produced + 1, step):
            self._send(json.dumps(_chunk(tokens)))
        if behaviour == "abort":
            self._send(json.dumps(_chunk(produced, reason={"type": "abort", "message": "gone"})))
        self._send("[DONE]")

    def _send(self, payload: str) -> None:
        self.wfile.write(f"data: {payload}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512  # a burst of connections must not be refused


def _chunk(tokens: int, reason: dict[str, str] | None = None) -> dict[str, Any]:
    meta = {"completion_tokens": tokens, "prompt_tokens": 5, "finish_reason": reason}
    return {"text": "x" * tokens, "meta_info": meta}


@contextlib.contextmanager
def streaming_server() -> Iterator[str]:
    """Serve on a free port of the loopback interface; yield the base URL."""
    released = threading.Event()
    handler = type("Generate", (_Generate,), {"released": released})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        released.set()
        server.shutdown()
        server.server_close()
        thread.join()
