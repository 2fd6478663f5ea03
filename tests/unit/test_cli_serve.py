"""`sglang-alloc serve`: what it checks first, and what it then becomes."""

import importlib.util
import json
import os
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from table_factory import make_full_tables, make_tables, publish_and_open
from typer.testing import CliRunner

from sglang_alloc.budget_tables import save_budget_tables
from sglang_alloc.cli import app
from sglang_alloc.errors import (
    AllocError,
    ConfigurationError,
    ModelMismatchError,
    NotMoEError,
    SharedTableError,
    TableFormatError,
    UnsupportedServerError,
)
from sglang_alloc.model_identity import identity_from_config
from sglang_alloc.shared_table import SharedTable

CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "intermediate_size": 32,
    "vocab_size": 264,
}
FINGERPRINT = identity_from_config(CONFIG).fingerprint()


class Launch:
    """The folder of a launch, and the process image that `serve` asked for."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.command: list[str] = []
        self.environment: dict[str, str] = {}
        self.model = folder / "model"
        self.npz = folder / "tables.npz"
        self.shared_path = folder / "tiny.tbl"
        self.write_config(CONFIG)
        save_budget_tables(self.npz, make_tables(fingerprint=FINGERPRINT))

    def write_config(self, config: Any) -> None:
        self.model.mkdir(exist_ok=True)
        (self.model / "config.json").write_text(json.dumps(config))

    def execvpe(self, file: str, command: list[str], environment: dict[str, str]) -> None:
        assert file == command[0]
        self.command, self.environment = command, environment

    def serve(self, *options: str, arguments: list[str] | None = None) -> Result:
        server = ["--model-path", str(self.model), "--port", str(self.port), "--enable-metrics"]
        ours = ["--table", str(self.npz), "--shared-path", str(self.shared_path)]
        return self.run(*ours, *options, "--", *(server if arguments is None else arguments))

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["serve", *arguments])

    def refusal(self, *options: str, arguments: list[str] | None = None) -> AllocError:
        """The error of a launch that must neither start SGLang nor publish."""
        result = self.serve(*options, arguments=arguments)
        assert isinstance(result.exception, AllocError)
        assert (self.command, self.shared_path.exists()) == ([], False)
        return result.exception


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    prepared = Launch(tmp_path, port)
    monkeypatch.setattr(os, "execvpe", prepared.execvpe)
    for name in [name for name in os.environ if name.startswith("SGLANG_")]:
        monkeypatch.delenv(name)
    return prepared


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_serve_publishes_the_tables_and_becomes_sglang(launch: Launch) -> None:
    result = launch.serve()
    assert result.exit_code == 0
    assert launch.command[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert SharedTable.open(launch.shared_path).fingerprint == FINGERPRINT
    ours = {name: launch.environment[name] for name in launch.environment if "ALLOC" in name}
    assert ours == {
        "SGLANG_ALLOC_TABLE": str(launch.shared_path),
        "SGLANG_ALLOC_MODE": "",
        "SGLANG_ALLOC_FALLBACK": "full",
        "SGLANG_ALLOC_STALE_AFTER_SECONDS": "10",
        "SGLANG_ALLOC_REQUEST_BUDGETS": "lower",
        "SGLANG_ALLOC_PROTECTED_PRIORITY": "",
        "SGLANG_ALLOC_PRIORITY_FLOORS": "",
        "SGLANG_ALLOC_ROUTING": "",
    }
    assert launch.environment["PATH"] == os.environ["PATH"]
    assert "-m sglang.launch_server --model-path" in result.stderr


@pytest.mark.parametrize(
    ("options", "exported", "expected"),
    [
        (["--routing", "fused"], None, "fused"),
        ([], "fused", "fused"),
        (["--routing", "engine"], "fused", ""),
    ],
)
def test_what_serve_is_told_of_routing_wins_over_the_environment(
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    exported: str | None,
    expected: str,
) -> None:
    if exported is not None:
        monkeypatch.setenv("SGLANG_ALLOC_ROUTING", exported)
    assert launch.serve(*options).exit_code == 0
    assert launch.environment["SGLANG_ALLOC_ROUTING"] == expected


@pytest.mark.parametrize("separator", [["--"], []])
def test_sglang_s_arguments_pass_through_unchanged(launch: Launch, separator: list[str]) -> None:
    theirs = [
        "--model-path", str(launch.model), f"--port={launch.port}", "--enable-metrics",
        "--bucket-inter-token-latency", "0.01", "0.02", "--tp-size=2", "--log-level-http", "error",
    ]  # fmt: skip
    ours = ["--table", str(launch.npz), "--shared-path", str(launch.shared_path)]
    result = launch.run(*ours, *separator, *theirs)
    assert result.exit_code == 0
    assert launch.command[3:] == theirs
    assert result.stderr.count("warning") == 0


def test_after_the_separator_even_our_own_names_are_sglang_s(launch: Launch) -> None:
    theirs = ["--port", str(launch.port), "--mode", "x", "--help", "--", "--table"]
    launch.serve(arguments=theirs)
    assert launch.command[3:] == theirs


def test_the_settings_reach_the_worker(launch: Launch) -> None:
    save_budget_tables(launch.npz, make_full_tables())
    options = ["--mode", "threshold", "--fallback", "7", "--stale-after-seconds", "2.5"]
    options.append("--correct-drift")
    launch.serve(*options, arguments=["--model-path", "not/local", "--port", str(launch.port)])
    values = [launch.environment[f"SGLANG_ALLOC_{name}"] for name in ("MODE", "FALLBACK")]
    assert values == ["threshold", "7"]
    assert launch.environment["SGLANG_ALLOC_STALE_AFTER_SECONDS"] == "2.5"
    assert launch.environment["SGLANG_ALLOC_CORRECT_DRIFT"] == "1"


def test_the_environment_gives_what_the_options_leave_out(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_and_open(launch.shared_path, fingerprint=FINGERPRINT)
    monkeypatch.setenv("SGLANG_ALLOC_TABLE", str(launch.shared_path))
    monkeypatch.setenv("SGLANG_ALLOC_MODE", "token")
    result = launch.run("--fallback", "hold", "--", "--port", str(launch.port))
    assert result.exit_code == 0
    assert launch.environment["SGLANG_ALLOC_MODE"] == "token"
    assert launch.environment["SGLANG_ALLOC_FALLBACK"] == "hold"


def test_a_published_table_is_served_as_it_is(launch: Launch) -> None:
    before = publish_and_open(launch.shared_path, fingerprint=FINGERPRINT).publication_id
    result = launch.run("--table", str(launch.shared_path), "--", "--port", str(launch.port))
    assert result.exit_code == 0
    assert SharedTable.open(launch.shared_path).publication_id == before
    assert "add --enable-metrics" in result.stderr


def test_a_second_path_for_a_published_table_is_refused(launch: Launch) -> None:
    publish_and_open(launch.folder / "other.tbl")
    error = launch.refusal("--table", str(launch.folder / "other.tbl"))
    assert isinstance(error, ConfigurationError)
    assert "says where to publish a .npz" in str(error)


def test_a_dense_model_is_refused(launch: Launch) -> None:
    launch.write_config(CONFIG | {"num_experts": None, "architectures": ["LlamaForCausalLM"]})
    error = launch.refusal()
    assert isinstance(error, NotMoEError)
    assert "LlamaForCausalLM" in str(error)


def test_a_table_of_another_model_is_refused(launch: Launch) -> None:
    launch.write_config(CONFIG | {"hidden_size": 128})
    error = launch.refusal()
    assert isinstance(error, ModelMismatchError)
    assert "made for tiny-moe" in str(error)
    assert "hidden_size=128" in str(error)


def test_a_folder_to_publish_in_must_be_there_before_anything_starts(launch: Launch) -> None:
    launch.shared_path = launch.folder / "absent" / "tiny.tbl"
    problem = launch.refusal()
    assert isinstance(problem, SharedTableError)
    assert f"there is no folder {launch.folder / 'absent'}" in str(problem)
    assert not launch.shared_path.parent.exists()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_model_configuration_is_refused(launch: Launch, content: str) -> None:
    (launch.model / "config.json").write_text(content)
    assert isinstance(launch.refusal(), ConfigurationError)


def test_a_missing_table_is_refused(launch: Launch) -> None:
    launch.npz.unlink()
    assert isinstance(launch.refusal(), TableFormatError)
    launch.shared_path.unlink(missing_ok=True)
    result = launch.run("--table", str(launch.shared_path), "--", "--port", str(launch.port))
    assert isinstance(result.exception, SharedTableError)


@pytest.mark.parametrize("damage", [b"", b"PK\3\4", b"SGLALLOC"])
def test_a_corrupt_table_is_refused(launch: Launch, damage: bytes) -> None:
    corrupt = launch.folder / "corrupt"
    corrupt.write_bytes(damage)
    result = launch.run("--table", str(corrupt), "--", "--port", str(launch.port))
    assert isinstance(result.exception, SharedTableError | TableFormatError)
    assert str(corrupt) in str(result.exception)
    assert launch.command == []


def test_a_port_in_use_is_refused(launch: Launch, taken_port: int) -> None:
    error = launch.refusal(arguments=["--port", str(taken_port)])
    assert f"cannot listen on 127.0.0.1:{taken_port}" in str(error)
    assert "choose another with --port" in str(error)


def test_an_address_of_another_machine_is_refused(launch: Launch) -> None:
    arguments = ["--host", "192.0.2.1", "--port", str(launch.port)]
    assert "cannot listen on 192.0.2.1" in str(launch.refusal(arguments=arguments))


@pytest.mark.parametrize("port", ["many", "70000"])
def test_an_impossible_port_is_refused(launch: Launch, port: str) -> None:
    assert isinstance(launch.refusal(arguments=["--port", port]), ConfigurationError)


def test_a_list_of_plugins_without_ours_is_refused(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "other, another")
    assert "Add sglang_alloc to it" in str(launch.refusal())
    monkeypatch.setenv("SGLANG_PLUGINS", "other, sglang_alloc")
    assert launch.serve().exit_code == 0


def test_an_environment_without_sglang_is_refused(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = launch.refusal()
    assert isinstance(error, UnsupportedServerError)
    assert "this Python environment has none" in str(error)


def test_an_sglang_out_of_the_supported_range_is_refused(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.4.0")
    assert "SGLang 0.4.0 is outside the supported range" in str(launch.refusal())


def test_a_plugin_that_sglang_would_not_find_is_refused(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: ())
    assert "Install sglang-alloc with pip" in str(launch.refusal())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "threshold"], "holds no thresholds"),
        (["--fallback", "2"], "covers 3 to 12"),
        (["--fallback", "some"], "not a fallback"),
        (["--correct-drift"], "moves calibrated thresholds"),
        (["--priority-floors", "5:13"], "floor of priority 5"),
        (["--priority-floors", "high"], "which is no floor"),
        (["--priority-floors", "0:9", "--protected-priority", "5"], "end with 5:full"),
        (["--stale-after-seconds", "-1"], "not a positive number of seconds"),
    ],
)
def test_a_setting_that_the_table_cannot_serve_is_refused(
    launch: Launch, options: list[str], message: str
) -> None:
    assert message in str(launch.refusal(*options))


def test_an_unknown_mode_is_a_usage_error(launch: Launch) -> None:
    result = launch.serve("--mode", "fastest")
    assert result.exit_code == 2
    assert "'fastest' is not one of" in result.stderr


def test_what_requests_may_ask_for_reaches_the_worker(launch: Launch) -> None:
    launch.serve("--request-budgets", "any", "--protected-priority", "5")
    assert launch.environment["SGLANG_ALLOC_REQUEST_BUDGETS"] == "any"
    assert launch.environment["SGLANG_ALLOC_PROTECTED_PRIORITY"] == "5"


def test_floors_of_priorities_reach_the_worker(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ALLOC_PRIORITY_FLOORS", "5:9")
    launch.serve()
    assert launch.environment["SGLANG_ALLOC_PRIORITY_FLOORS"] == "5:9"
    launch.serve("--priority-floors", "0:4,5:9,10:full")
    assert launch.environment["SGLANG_ALLOC_PRIORITY_FLOORS"] == "0:4,5:9,10:full"
