"""`sglang-alloc serve`, before SGLang starts: what would make it fail late or serve unbudgeted."""

import argparse
import importlib.util
import json
import socket
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.compatibility import unsupported_version
from sglang_alloc.errors import (
    ConfigurationError,
    ModelMismatchError,
    UnsupportedServerError,
    reason_of,
)
from sglang_alloc.model_identity import ModelIdentity, identity_from_config

PLUGIN_GROUP = "sglang.srt.plugins"
PLUGIN_NAME = "sglang_alloc"


class LaunchArguments(NamedTuple):
    """What the checks need of SGLang's arguments, with SGLang's defaults."""

    model_path: str | None
    host: str
    port: int


def launch_arguments(arguments: Sequence[str]) -> LaunchArguments:
    """Read model, host and port out of SGLang's arguments, which stay as they are.

    Raises:
        ConfigurationError: the port is not a number from 1 to 65535.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=30000, type=int)
    try:
        known, _ = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigurationError(f"SGLang's arguments cannot be read: {error}.") from error
    if not 1 <= known.port <= 65535:
        raise ConfigurationError(f"--port {known.port} is not a port: give one from 1 to 65535.")
    return LaunchArguments(known.model_path, known.host, known.port)


def require_sglang() -> None:
    """Raise `UnsupportedServerError` unless a supported SGLang and this plugin are installed here.

    SGLang is looked for without importing it, which would take seconds.
    """
    if importlib.util.find_spec("sglang") is None:
        raise UnsupportedServerError(
            "SGLang is to be served, but this Python environment has none. Install sglang-alloc "
            "into the environment that SGLang runs in."
        )
    problems = unsupported_version(metadata.version("sglang"))
    if problems:
        raise UnsupportedServerError("; ".join(problems))
    if not any(point.name == PLUGIN_NAME for point in metadata.entry_points(group=PLUGIN_GROUP)):
        raise UnsupportedServerError(
            f"SGLang finds plugins by the entry points of {PLUGIN_GROUP}, and {PLUGIN_NAME} is not "
            "among them. Install sglang-alloc with pip instead of running it from a folder."
        )


def require_plugin_allowed(environment: Mapping[str, str]) -> None:
    """Raise `ConfigurationError` when SGLANG_PLUGINS keeps our plugin from being loaded."""
    allowed = [name.strip() for name in environment.get("SGLANG_PLUGINS", "").split(",")]
    if any(allowed) and PLUGIN_NAME not in allowed:
        raise ConfigurationError(
            f"SGLANG_PLUGINS={environment['SGLANG_PLUGINS']} lets SGLang load only those plugins, "
            f"so no budget would hold. Add {PLUGIN_NAME} to it, or unset it."
        )


def require_same_model(model_path: str | None, fingerprint: str, model_id: str) -> None:
    """Compare a table's fingerprint with the model's, if its config.json is a local file.

    Models that SGLang will download are checked by the plugin when they are loaded.

    Raises:
        NotMoEError: the model is dense.
        ModelMismatchError: the table was made for another model.
        ConfigurationError: config.json cannot be read.
    """
    config_path = Path(model_path or "") / "config.json"
    if not model_path or not config_path.is_file():
        return
    identity = _identity(config_path)
    if identity.fingerprint() != fingerprint:
        raise ModelMismatchError(
            f"The budget table was made for {model_id} (fingerprint {fingerprint[:12]}), and the "
            f"model at {model_path} is another one (fingerprint {identity.fingerprint()[:12]}: "
            f"{identity}). Give the table of this model, or make one by profiling it."
        )


def require_free_port(host: str, port: int) -> None:
    """Raise `ConfigurationError` when the server could not listen on `host`:`port`."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind, protocol) as probe:
            # As uvicorn does: connections of an ended server do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigurationError(
            f"SGLang cannot listen on {host}:{port}: {error}. Stop what uses that port, or choose "
            "another with --port."
        ) from error


def _identity(config_path: Path) -> ModelIdentity:
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise ConfigurationError(
            f"The model's {config_path} cannot be read: {reason}. Give a folder with the model's "
            "config.json as --model-path."
        ) from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"The model's {config_path} is not a JSON object.")
    return identity_from_config(config)
