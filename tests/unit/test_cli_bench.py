"""`sglang-alloc bench`: what it serves and measures by default, and what it refuses beforehand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sglang_alloc.bench import run as bench_run
from sglang_alloc.bench.latency import LatencyOptions
from sglang_alloc.bench.options import Asked, make_options
from sglang_alloc.bench.timing import ON_CPU, ON_GPU, Sizes
from sglang_alloc.cli import app
from sglang_alloc.errors import AllocError, ConfigurationError
from sglang_alloc.server_runs import machine, server_process
from sglang_alloc.server_runs.errors import ServerRunError
from sglang_alloc.server_runs.reference_files import MODEL
from sglang_alloc.server_runs.server_process import CPU_ENVIRONMENT, started_server

NOTHING = Asked(
    model_path=None,
    tables=None,
    texts=(),
    mode=None,
    routing="engine",
    stock=None,
    budgets=(),
    decode_batches=None,
    prefill_batches=None,
    prompt_tokens=None,
    decode_steps=None,
    rounds=5,
    seed=0,
    out=Path("out"),
    arguments=(),
)


def _on_cpu(**asked: Any) -> LatencyOptions:
    return make_options(NOTHING._replace(**asked), lambda _: True)


def _on_gpu(**asked: Any) -> LatencyOptions:
    return make_options(NOTHING._replace(**asked), lambda _: False)


class StartedError(Exception):
    """Stands for a server that would run now."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Return (command, environment added) of every server that would be started."""
    seen: list[tuple[list[str], dict[str, str]]] = []

    @contextlib.contextmanager
    def owned_process(
        name: str, command: Sequence[str], *, env: Mapping[str, str], **options: object
    ) -> Iterator[None]:
        seen.append((list(command), dict(env)))
        raise StartedError
        yield

    monkeypatch.setattr(server_process, "owned_process", owned_process)
    return seen


def test_a_gpu_server_gets_the_callers_arguments_and_nothing_of_a_cpu(
    started: list[tuple[list[str], dict[str, str]]], tmp_path: Path
) -> None:
    theirs = ("--tp-size", "8", "--trust-remote-code")
    options = _on_gpu(arguments=theirs, mode="layer", routing="fused", out=tmp_path)
    with pytest.raises(StartedError):
        bench_run.run_bench(options, Console(quiet=True))
    [(command, environment)] = started
    ours, sglangs = command[: command.index("--")], command[command.index("--") + 1 :]
    assert [Path(ours[0]).name, ours[1], *ours[-2:]] == ["sglang-alloc", "serve", "--mode", "layer"]
    port = sglangs[3]
    assert sglangs == [
        *("--model-path", str(MODEL), "--port", port),
        *("--enable-metrics", "--disable-radix-cache", *theirs),
    ]
    assert environment == {"SGLANG_ALLOC_ROUTING": "fused"}


def test_a_cpu_server_gets_a_cpu_s_arguments_before_the_callers(
    started: list[tuple[list[str], dict[str, str]]], tmp_path: Path
) -> None:
    options = _on_cpu(arguments=("--dtype", "bfloat16"), out=tmp_path)
    with pytest.raises(StartedError):
        bench_run.run_bench(options, Console(quiet=True))
    [(command, environment)] = started
    assert command[command.index("--device") + 1] == "cpu"
    assert command[-2:] == ["--dtype", "bfloat16"]  # the last one counts
    assert CPU_ENVIRONMENT.items() <= environment.items()


def test_a_stock_server_on_a_gpu_is_sglang_alone(
    started: list[tuple[list[str], dict[str, str]]], tmp_path: Path
) -> None:
    arguments = _on_gpu().server_arguments
    log = tmp_path / "log"
    with (
        pytest.raises(StartedError),
        started_server(MODEL, log_path=log, extra_args=arguments, on_cpu=False),
    ):
        pass
    [(command, environment)] = started
    assert command[1:3] == ["-m", "sglang.launch_server"]
    assert "--device" not in command
    assert environment == {}


def test_stock_is_measured_beside_on_a_cpu_and_on_request_on_a_gpu() -> None:
    assert [_on_cpu().stock, _on_cpu(stock=False).stock] == [True, False]
    assert [_on_gpu().stock, _on_gpu(stock=True).stock] == [False, True]


def test_sizes_suit_the_device_unless_they_are_given() -> None:
    assert (_on_cpu().sizes, _on_gpu().sizes) == (ON_CPU, ON_GPU)
    asked = _on_gpu(decode_batches=(4,), prefill_batches=(2,), prompt_tokens=64, decode_steps=8)
    assert asked.sizes == Sizes((4,), (2,), 64, 8)


def test_full_budget_is_always_among_those_asked_for() -> None:
    assert _on_cpu(budgets=("13", "0.5x", "20")).cases == (("full", 40), ("20", 20), ("13", 13))
    assert [name for name, _ in _on_cpu().cases][:2] == ["full", "one below full"]


def test_the_precision_of_a_model_of_ones_own_is_sglang_s_choice(tmp_path: Path) -> None:
    copy = tmp_path / "mine"
    copy.mkdir()
    for name in ("config.json", "budget_tables.npz"):
        (copy / name).write_bytes((MODEL / name).read_bytes())
    assert "--dtype" in _on_cpu().server_arguments
    assert "--dtype" not in _on_cpu(model_path=copy).server_arguments
    assert "--dtype" not in _on_gpu().server_arguments


@pytest.mark.parametrize("argument", ["--port", "--port=30000", "--model-path", "--model"])
def test_what_the_bench_chooses_itself_is_refused_behind_the_dashes(argument: str) -> None:
    with pytest.raises(ConfigurationError, match=r"behind `--`"):
        _on_cpu(arguments=("--tp-size", "2", argument))


def test_a_budget_that_the_tables_lack_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="budget '3'"):
        _on_cpu(budgets=("3",))


def test_tables_of_another_model_are_refused() -> None:
    other = MODEL.with_name("olmoe-ref") / "budget_tables.npz"
    with pytest.raises(AllocError, match="made for"):
        _on_cpu(tables=other)


def test_missing_tables_end_the_bench_with_a_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--model-path", str(tmp_path)])
    assert isinstance(result.exception, AllocError)
    assert "budget table" in str(result.exception)


@pytest.mark.parametrize("text", ["1,,2", "0", "-1", "1.5", "x", ""])
def test_sizes_that_are_no_numbers_are_refused(text: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--decode-batches", text])
    assert isinstance(result.exception, ConfigurationError)
    assert "--decode-batches" in str(result.exception)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ServerRunError("gone")])
def test_what_ends_the_bench_early_leaves_no_csv(
    interruption: BaseException | type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def measure_latency(*_: object) -> None:
        raise interruption

    monkeypatch.setattr(bench_run, "measure_latency", measure_latency)
    result = CliRunner().invoke(app, ["bench", "-o", str(tmp_path), "--", "--device", "cpu"])
    if interruption is KeyboardInterrupt:
        assert result.exit_code == 130
        assert "Interrupted: every server is stopped, nothing was written." in result.output
    else:
        assert result.exception is interruption
    assert not (tmp_path / "latency.csv").exists()


def test_a_row_names_the_gpus_their_driver_and_the_callers_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\ncase "$*" in *=name*) echo NVIDIA X; echo NVIDIA X;; *) echo 5.1;; esac\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    facts = bench_run.facts(_on_gpu(arguments=("--tp-size", "2")))
    assert (facts["gpu"], facts["driver"]) == ("NVIDIA X", "5.1")
    assert facts["server_arguments"] == "--disable-radix-cache --tp-size 2"
    assert facts["mode"] == "threshold"
    assert {"cuda", "sglang", "torch", "commit", "date"} <= facts.keys()


def test_a_machine_without_gpus_says_so() -> None:
    assert machine.gpu_facts(on_cpu=True) == {"gpu": "-", "driver": "-", "cuda": "-"}
