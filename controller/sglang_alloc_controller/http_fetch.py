"""Control story, first step: one HTTP GET that ends in time whatever the other side does."""

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

import httpx2

from sglang_alloc_controller.samples import SourceError
from sglang_alloc_controller.shown_url import shown_url

_ERROR_EXCERPT_CHARS = 120


class StatusError(SourceError):
    """The other side answered, with another status than 200."""

    def __init__(self, url: str, status: int, excerpt: str, remedy: str = "") -> None:
        """Take what was asked, what came and, where it is known, what to do."""
        sentence = f"{shown_url(url)} answered with status {status}: {excerpt!r}."
        super().__init__(f"{sentence} {remedy}".rstrip())
        self.status = status


class HttpFetcher:
    """A kept-open HTTP client with a limit on the whole answer, in seconds and in bytes.

    The limits of HTTP clients are per read, so a server that sends one byte a second would hold
    one for ever, in its headers as in its body. A timer cuts the connection when the time is over.
    """

    def __init__(
        self,
        timeout_seconds: float,
        max_bytes: int,
        clock: Callable[[], float],
        remedy: str,
    ) -> None:
        """Take the limits; `clock` is monotonic, in seconds.

        `remedy` is a sentence that tells what to do where nobody listens or nothing is found.
        """
        self._remedy = remedy
        self._timeout_seconds = timeout_seconds
        self._max_bytes = max_bytes
        self._clock = clock
        self._socket: socket.socket | None = None
        # Neither a proxy of the environment nor the engine's time for compression is wanted.
        self._client = httpx2.Client(
            timeout=timeout_seconds,
            follow_redirects=False,
            trust_env=False,
            headers={"Accept-Encoding": "identity"},
        )

    def get_text(self, url: str, params: Mapping[str, str] | None = None) -> str:
        """Return the body of a 200 answer.

        Raises:
            SourceError: no connection, another status, not text, too slow or too long.
        """
        deadline_seconds = self._clock() + self._timeout_seconds
        timer = threading.Timer(self._timeout_seconds, self._cut)
        timer.daemon = True
        timer.start()
        try:
            with self._client.stream(
                "GET", url, params=params, extensions={"trace": self._take_connection}
            ) as response:
                body = self._body(url, response)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            if isinstance(error, httpx2.TimeoutException) or self._clock() >= deadline_seconds:
                raise self._too_slow(url) from error
            reason = str(error) or type(error).__name__
            raise SourceError(f"Cannot read {shown_url(url)}: {reason}. {self._remedy}") from error
        finally:
            timer.cancel()
        if self._clock() >= deadline_seconds:
            # What was cut may look like a whole answer.
            raise self._too_slow(url)
        text = body.decode("utf-8", errors="replace")
        if response.status_code != httpx2.codes.OK:
            excerpt = " ".join(text[:_ERROR_EXCERPT_CHARS].split())
            not_there = response.status_code == httpx2.codes.NOT_FOUND
            remedy = self._remedy if not_there else ""
            raise StatusError(url, response.status_code, excerpt, remedy)
        return text

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _take_connection(self, event: str, info: Mapping[str, Any]) -> None:
        """Remember the connection in use; the client tells of it when it makes one."""
        if event in {"connection.connect_tcp.complete", "connection.start_tls.complete"}:
            self._socket = info["return_value"].get_extra_info("socket")

    def _cut(self) -> None:
        """End the read that is under way, from another thread."""
        connected = self._socket
        if connected is not None:
            with contextlib.suppress(OSError):
                # Not the method of a TLS socket, which would take its state from the reader.
                socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def _body(self, url: str, response: httpx2.Response) -> bytes:
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > self._max_bytes:
                raise SourceError(
                    f"{shown_url(url)} sent over {self._max_bytes} bytes; that is no metrics page."
                )
        return bytes(body)

    def _too_slow(self, url: str) -> SourceError:
        return SourceError(
            f"{shown_url(url)} did not answer within {self._timeout_seconds} s "
            "(source.timeout_seconds)."
        )
