"""Control story, beside every step: who may use the endpoints that change something.

On loopback anybody of the machine, unless there is a token. Elsewhere only the token: the address
of a client proves nothing there, since the proxies of a service mesh connect from loopback.
"""

import hmac
import ipaddress
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.settings import ControlSettings

TOKEN_VARIABLE = "SGLANG_ALLOC_CONTROL_TOKEN"
_TOKEN_MIN_CHARS = 16
_BEARER = "Bearer "


Header = Callable[[str], str]
"""Returns a request's header by its name, "" where there is none."""


class Refusal(NamedTuple):
    """Why a request is not obeyed."""

    status: int
    sentence: str


class Permit:
    """The rule of one controller."""

    def __init__(
        self, host: str, settings: ControlSettings, environment: Mapping[str, str]
    ) -> None:
        """Take the address that is listened on and where the token is.

        Raises:
            ConfigurationError: the token cannot be read, or is too short.
        """
        self._on_loopback = is_loopback(host)
        self._file = Path(settings.token_file) if settings.token_file is not None else None
        self._from_environment = environment.get(TOKEN_VARIABLE)
        if self.needs_token:
            _require_long(self._token())

    @property
    def needs_token(self) -> bool:
        """Whether a token is set."""
        return self._file is not None or self._from_environment is not None

    def refusal(self, header: Header) -> Refusal | None:
        """Return why a request with these headers is refused, or None. Compares in equal time.

        Without a token the Host header must name loopback, because a page in a browser of this
        machine could otherwise reach it under a name of its own (DNS rebinding).
        """
        if self.needs_token:
            return self._without_token(header("Authorization"))
        if not self._on_loopback:
            return Refusal(
                403,
                "http.host is not loopback, so this needs a token: set control.token_file or "
                f"{TOKEN_VARIABLE} and restart, or use the kill switch's file.",
            )
        host = header("Host").rpartition(":")[0] or header("Host")
        if not is_loopback(host.strip("[]")):
            return Refusal(403, "Use http://127.0.0.1 or http://localhost here.")
        return None

    def _without_token(self, authorization: str) -> Refusal | None:
        try:
            token = self._token()
            _require_long(token)
        except ConfigurationError as error:
            return Refusal(503, str(error))
        given = authorization.removeprefix(_BEARER) if authorization.startswith(_BEARER) else ""
        if hmac.compare_digest(given.encode(), token.encode()):
            return None
        return Refusal(401, "Send the token: Authorization: Bearer TOKEN.")

    def _token(self) -> str:
        if self._file is None:
            return (self._from_environment or "").strip()
        try:
            return self._file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigurationError(
                f"control.token_file is {self._file}, which cannot be read: {reason}."
            ) from error


def is_loopback(host: str) -> bool:
    """Tell whether this address or name can only be reached from the machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_long(token: str) -> None:
    if len(token) < _TOKEN_MIN_CHARS:
        raise ConfigurationError(
            f"The token for the control endpoints has {len(token)} characters; give it at least "
            f"{_TOKEN_MIN_CHARS}, for example from `openssl rand -hex 16`."
        )
