"""`sglang-alloc calibrate` from the command line to the file, with a server that is a formula."""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from reference_factory import make_model
from typer.testing import CliRunner

from sglang_alloc import cli_profile_run, profile_run
from sglang_alloc.budget_tables import BudgetTables, load_budget_tables
from sglang_alloc.cli import app
from sglang_alloc.errors import AllocError, ConfigurationError, ModelMismatchError, TableFormatError
from sglang_alloc.moe_layers import read_model_folder
from sglang_alloc.profile_engine import ProfileError, Scored
from sglang_alloc.profile_windows import Window
from sglang_alloc.reference.export import export_checkpoint
from sglang_alloc.score_histogram import BINS_PER_OCTAVE, LOWEST_OCTAVE, NUM_BINS
from sglang_alloc.sensitivity_file import ProfiledModel, Sensitivities, save_sensitivities

LAYERS, TOP_K, EXPERTS = 2, 4, 8
GAIN = 1.2
SIZES = ("--window-tokens", "8", "--windows", "12", "--chunk", "4")


@dataclass
class Formula:
    """Loses what its rows and corrections say, and records scores and gains like the engine.

    `best_reference` loses least of all k2; a gain takes `gain_helps` off the loss.
    """

    probes: BudgetTables
    folder: Path
    best_reference: int = 3
    gain_helps: float = 0.01
    records: bool = True
    interrupt_after: int = 10**9
    broken: bool = False
    probe: int = 0
    forwarded: int = 0
    measured: set[int] = field(default_factory=set)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def flush(self) -> None:
        """Nothing is cached."""

    def set_probe(self, probe: int) -> None:
        if self.forwarded and self.records:
            self._write()
        self.probe, self.forwarded = probe, 0

    def whole_losses(self, windows: Sequence[Window]) -> Scored:
        self.interrupt_after -= 1
        if self.interrupt_after < 0:
            raise KeyboardInterrupt
        if self.broken:
            raise ProfileError("logits are not numbers")
        assert self.probes.threshold_quotas is not None
        assert self.probes.references is not None
        missing = float((TOP_K - self.probes.threshold_quotas[self.probe]).sum())
        away = abs(int(self.probes.references[self.probe, 0]) - self.best_reference)
        loss = 2.0 + 0.1 * missing + 0.01 * away * (missing > 0)
        loss -= self.gain_helps * self._finds_gain() * (missing > 0)
        self.forwarded += sum(len(w.prefix) + len(w.continuation) for w in windows)
        self.measured.add(self.probe)
        noise = [0.001 * (sum(window.prefix) % 7) for window in windows]
        return Scored(tuple(loss + part for part in noise), 8 * len(windows))

    def _finds_gain(self) -> bool:
        assert self.probes.gains is not None
        return bool(self.probes.gains[self.probe, 0] == 0.0)

    def _write(self) -> None:
        scores = np.random.default_rng(0).lognormal(sigma=0.7, size=(4000, TOP_K - 1))
        place = (np.log2(scores) - LOWEST_OCTAVE) * BINS_PER_OCTAVE
        counts = np.bincount(place.astype(int).ravel(), minlength=NUM_BINS)
        tokens = np.full(LAYERS, 4000)
        np.savez(
            self.folder / f"scores-{self.probe + 1}.npz", counts=[counts] * LAYERS, tokens=tokens
        )
        if self._finds_gain():
            np.savez(self.folder / f"gains-{self.probe + 1}.npz", gains=[GAIN] * LAYERS)


@dataclass
class Bench:
    """A tiny checkpoint, its sensitivities, a text, and the formula that serves it."""

    folder: Path
    settings: dict[str, Any]
    server: Formula | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "tables.npz"

    def calibrate(self, *options: str) -> Result:
        files = [str(self.folder / "s.npz"), "--model-path", str(self.folder / "model")]
        text = ["--text", str(self.folder / "text"), "-o", str(self.output)]
        return CliRunner().invoke(app, ["calibrate", *files, *text, *SIZES, *options])

    def tables(self, *options: str) -> BudgetTables:
        result = self.calibrate(*options)
        assert result.exit_code == 0, result.output
        return load_budget_tables(self.output)

    def refusal(self, *options: str) -> AllocError:
        result = self.calibrate(*options)
        assert isinstance(result.exception, AllocError), result.output
        assert not self.output.exists()
        return result.exception

    @contextlib.contextmanager
    def serving(
        self, _path: Path, probes: BudgetTables, note: str, *, folder: Path, **_: Any
    ) -> Iterator[Formula]:
        probes.validate()
        folder.mkdir(exist_ok=True)
        self.notes.append(note)
        self.server = Formula(probes, folder, **self.settings)
        yield self.server

    def write_sensitivities(self, **changes: Any) -> None:
        model = read_model_folder(self.folder / "model")
        halves = np.linspace(0.9, 0.0, 2 * TOP_K - 1) * np.array([[1.0], [0.5]])
        fields: dict[str, Any] = {
            "sensitivity": halves[:, ::2],
            "threshold_sensitivity": halves,
            "prefill_threshold_sensitivity": halves[::-1] / 50,
            "saliency": np.ones((LAYERS, EXPERTS)),
            "model": ProfiledModel("tiny", model.identity.fingerprint(), EXPERTS, model.layer_ids),
        }
        save_sensitivities(self.folder / "s.npz", Sensitivities(**(fields | changes)))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    export_checkpoint(make_model(), tmp_path / "model")
    (tmp_path / "text").write_text("the quick brown fox " * 30)
    made = Bench(tmp_path, {})
    made.write_sensitivities()
    monkeypatch.setattr(profile_run, "profiled_server", made.serving)
    monkeypatch.setattr(cli_profile_run, "require_sglang", lambda: None)
    return made


def test_corrections_that_lower_the_loss_are_in_the_tables(bench: Bench) -> None:
    tables = bench.tables()
    assert tables.references is not None
    assert (tables.references[:-1] == 3).all()
    assert (tables.references[-1] == TOP_K).all()
    assert tables.gains is not None
    assert tables.prefill_gains is not None
    np.testing.assert_allclose(tables.gains[0], GAIN)
    np.testing.assert_allclose(tables.prefill_gains[0], GAIN)
    assert (tables.gains[-1] == 1.0).all()
    losses: Any = tables.provenance["correction_losses"]
    assert losses["2"] == {"none": 0.61, "references": 0.6, "both": 0.59}
    assert bench.notes == ["probe:threshold+gains"]


def test_the_thresholds_and_references_serve_mode_union_too(bench: Bench) -> None:
    profiled = np.linspace(0.4, 0.0, TOP_K) * np.ones((LAYERS, 1))
    bench.write_sensitivities(union_sensitivity=profiled)
    arrays = bench.tables().arrays()
    assert "union_quotas" not in arrays
    for mine, theirs in (
        ("union_thresholds", "thresholds"),
        ("union_references", "references"),
        ("union_predicted_loss", "threshold_predicted_loss"),
    ):
        np.testing.assert_array_equal(arrays[mine], arrays[theirs])


def test_union_quotas_stay_where_nothing_is_calibrated(bench: Bench) -> None:
    profiled = np.linspace(0.4, 0.0, TOP_K) * np.ones((LAYERS, 1))
    bench.write_sensitivities(
        union_sensitivity=profiled, threshold_sensitivity=None, prefill_threshold_sensitivity=None
    )
    tables = bench.tables()
    assert tables.union_quotas is not None
    assert (tables.union_thresholds, tables.union_references) == (None, None)


def test_a_reference_that_is_no_better_is_left_out(bench: Bench) -> None:
    bench.settings = {"best_reference": TOP_K}
    tables = bench.tables()
    assert tables.references is None
    assert tables.gains is not None


def test_gains_that_raise_the_loss_are_left_out(bench: Bench) -> None:
    bench.settings = {"gain_helps": -0.002}
    tables = bench.tables()
    assert tables.references is not None
    assert (tables.gains, tables.prefill_gains) == (None, None)


def test_without_corrections_only_thresholds_are_made(bench: Bench) -> None:
    corrected = bench.tables()
    assert bench.server is not None
    probes_with = len(bench.server.measured)
    tables = bench.tables("--no-corrections")
    assert (tables.references, tables.gains) == (None, None)
    assert tables.thresholds is not None
    np.testing.assert_allclose(tables.thresholds, corrected.thresholds)
    assert len(bench.server.measured) < probes_with
    assert bench.notes[-1] == "probe:threshold"


def test_a_profile_without_thresholds_needs_no_server(bench: Bench) -> None:
    bench.write_sensitivities(threshold_sensitivity=None, prefill_threshold_sensitivity=None)
    tables = bench.tables()
    assert tables.thresholds is None
    assert bench.notes == []


def test_an_interruption_writes_nothing(bench: Bench) -> None:
    bench.settings = {"interrupt_after": 5}
    result = bench.calibrate()
    assert result.exit_code == 130
    assert "nothing was written" in result.stderr
    assert not bench.output.exists()


def test_logits_that_are_not_numbers_end_it(bench: Bench) -> None:
    bench.settings = {"broken": True}
    assert "not numbers" in str(bench.refusal())


def test_an_engine_that_records_nothing_is_named(bench: Bench) -> None:
    bench.settings = {"records": False}
    error = bench.refusal()
    assert isinstance(error, ConfigurationError)
    assert "is the folder shared" in str(error)


def test_a_full_disk_leaves_the_tables_that_were_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bench.tables()
    content = bench.output.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sglang_alloc.atomic_file.os.fsync", full)
    result = bench.calibrate()
    assert isinstance(result.exception, TableFormatError)
    assert "No space left" in str(result.exception)
    assert bench.output.read_bytes() == content
    assert load_budget_tables(bench.output).provenance == before.provenance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--window-tokens", "999"), "one window needs 999"),
        (("--windows", "200"), "asks for 200"),
        (("--max-quota", "9"), "9"),
    ],
)
def test_what_cannot_be_calibrated_is_said(
    bench: Bench, options: tuple[str, ...], message: str
) -> None:
    assert message in str(bench.refusal(*options))


def test_sensitivities_of_another_model_are_refused(bench: Bench) -> None:
    model = read_model_folder(bench.folder / "model")
    bench.write_sensitivities(model=ProfiledModel("other", "ab" * 32, EXPERTS, model.layer_ids))
    assert isinstance(bench.refusal(), ModelMismatchError)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sensitivities_that_are_not_finite_are_refused(bench: Bench, bad: float) -> None:
    matrix = np.ones((LAYERS, TOP_K))
    matrix[1, 2] = bad
    np.savez(bench.folder / "s.npz", sensitivity=matrix)
    assert f"found {bad}" in str(bench.refusal())
