"""`sglang-alloc profile` from the command line to the file, with a server that is a formula."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from reference_factory import make_model
from typer.testing import CliRunner

from sglang_alloc import cli_profile_run, profile_run
from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.cli import app
from sglang_alloc.errors import AllocError, ConfigurationError
from sglang_alloc.profile_engine import Scored
from sglang_alloc.profile_windows import Window
from sglang_alloc.reference.export import export_checkpoint
from sglang_alloc.sensitivity_file import load_sensitivities

SIZES = ("--prefix-tokens", "6", "--continuation-tokens", "2", "--windows", "12", "--chunk", "4")


@dataclass
class Formula:
    """Loses 0.3 for each slot that the first layer lacks and 0.1 for each of the second."""

    rows: np.ndarray
    interrupt_after: int = 10**9
    full_loss: float = 2.0
    silent_layer: int | None = None
    probe: int = 0
    prefix_probe: int = 0

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def set_probe(self, probe: int) -> None:
        self.probe = probe

    def flush(self) -> None:
        """Nothing is cached."""

    def prefill(self, windows: Sequence[Window]) -> int:
        self.prefix_probe = self.probe
        return sum(len(window.prefix) for window in windows)

    def score(self, windows: Sequence[Window], top_tokens: int = 0) -> Scored:
        self.interrupt_after -= 1
        if self.interrupt_after < 0:
            raise KeyboardInterrupt
        lost = 0.0
        for layer, weight in enumerate((0.3, 0.1)):
            missing = 4 - float(self.rows[self.probe, layer])
            missing += 0.01 * (4 - float(self.rows[self.prefix_probe, layer]))
            lost += 0.0 if layer == self.silent_layer else weight * missing
        return Scored(tuple(self.full_loss + lost for _ in windows), 3 * len(windows))


@dataclass
class Bench:
    """A tiny checkpoint, a text, and the formula that the next run is served by."""

    folder: Path
    settings: dict[str, Any]
    starts: int = 0

    def profile(self, *options: str) -> Result:
        arguments = ["--model-path", str(self.folder / "model"), "-o", str(self.folder / "s.npz")]
        text = ["--text", str(self.folder / "text")]
        return CliRunner().invoke(app, ["profile", *arguments, *text, *SIZES, *options])

    @contextlib.contextmanager
    def server(self, _path: Path, probes: BudgetTables, *_: Any, **__: Any) -> Iterator[Formula]:
        self.starts += 1
        assert probes.threshold_quotas is not None
        probes.validate()
        yield Formula(probes.threshold_quotas, **self.settings)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    export_checkpoint(make_model(), tmp_path / "model")
    (tmp_path / "text").write_text("the quick brown fox " * 30)
    made = Bench(tmp_path, {})
    monkeypatch.setattr(profile_run, "profiled_server", made.server)
    monkeypatch.setattr(cli_profile_run, "require_sglang", lambda: None)
    return made


def _refusal(result: Result, folder: Path) -> AllocError:
    assert isinstance(result.exception, AllocError), result.output
    assert not (folder / "s.npz").exists()
    return result.exception


def test_a_profile_is_written_with_its_model_and_its_cost(bench: Bench) -> None:
    result = bench.profile("--model-id", "tiny", "--measure", "1,2,3")
    assert result.exit_code == 0, result.output
    found = load_sensitivities(bench.folder / "s.npz")
    np.testing.assert_allclose(found.sensitivity, np.outer([0.3, 0.1], [3, 2, 1, 0]), atol=1e-12)
    assert found.prefill_sensitivity is not None
    np.testing.assert_allclose(found.prefill_sensitivity, found.sensitivity / 100, atol=1e-12)
    assert found.model is not None
    assert (found.model.model_id, found.layer_ids) == ("tiny", (0, 1))
    assert f"{found.provenance['forward_tokens']:,} forward tokens" in result.output


def test_an_interrupted_profile_goes_on_from_the_disk(bench: Bench) -> None:
    bench.settings = {"interrupt_after": 5}
    interrupted = bench.profile()
    assert interrupted.exit_code == 130
    assert "the same command goes on" in interrupted.stderr
    assert not (bench.folder / "s.npz").exists()
    bench.settings = {}
    assert bench.profile().exit_code == 0
    journal = (bench.folder / "s.npz.profile" / "journal.jsonl").read_text()
    assert len(journal.splitlines()) == len(set(journal.splitlines()))


def test_a_profile_of_other_text_is_refused(bench: Bench) -> None:
    bench.settings = {"interrupt_after": 5}
    bench.profile()
    (bench.folder / "text").write_text("another text " * 50)
    assert "text_sha256 was" in str(_refusal(bench.profile(), bench.folder))


def test_a_layer_that_never_routes_is_named(bench: Bench) -> None:
    bench.settings = {"silent_layer": 1}
    error = _refusal(bench.profile(), bench.folder)
    assert "MoE layer 1 changed no loss" in str(error)


def test_text_of_another_tokenizer_is_noticed_by_its_loss(bench: Bench) -> None:
    bench.settings = {"full_loss": 50.0}
    assert "guessing among" in str(_refusal(bench.profile(), bench.folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mode", "layer,loud"), "--mode 'layer,loud' names loud"),
        (("--phase", ""), "--phase '' names nothing"),
        (("--measure", "1,many"), "--measure 1,many is not a list"),
        (("--measure", "9"), "keeps 1 to 4"),
        (("--context", "target"), "give --target-quota"),
        (("--prefix-tokens", "999"), "one window needs 1001"),
        (("--windows", "76"), "at most 75 windows, and --windows asks for 76"),
    ],
)
def test_what_cannot_be_profiled_is_said_before_a_server_starts_or_a_file_is_written(
    bench: Bench, options: tuple[str, ...], message: str
) -> None:
    error = _refusal(bench.profile(*options), bench.folder)
    assert isinstance(error, ConfigurationError)
    assert message in str(error)
    assert bench.starts == 0
    assert not (bench.folder / "s.npz.profile").exists()


def test_text_that_only_the_tokenizer_finds_short_does_not_spoil_the_output(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(_server: Formula, texts: Sequence[str]) -> list[list[int]]:
        return [list(range(len(text.split()))) for text in texts]

    with monkeypatch.context() as patched:
        patched.setattr(Formula, "tokenize", words)
        error = _refusal(bench.profile("--windows", "50"), bench.folder)
    assert "holds 15 windows" in str(error)
    (bench.folder / "text").write_text("another text " * 50)
    result = bench.profile("--windows", "50")
    assert result.exit_code == 0, result.output
