"""Measuring a series of probes, against a server that is a formula."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_alloc.allocation_mode import Phase
from sglang_alloc.profile_engine import ProfileError, Scored
from sglang_alloc.profile_journal import ProfileJournal
from sglang_alloc.profile_plan import ProbePlan, make_plan, sensitivity_of
from sglang_alloc.profile_series import Series, mean_divergence
from sglang_alloc.profile_settings import ProfileSettings
from sglang_alloc.profile_windows import Window

SETTINGS = ProfileSettings(
    windows=16, prefix_tokens=3, continuation_tokens=2, chunk_windows=4, union_steps=2
)
WINDOWS = [Window((n, n, n), (n, n + 1)) for n in range(16)]
PLAN = make_plan(2, 3, "isolated", (1, 2))
TRUTH = np.array([[0.4, 0.1, 0.0], [0.2, 0.05, 0.0]])


@dataclass
class FormulaServer:
    """Loses what TRUTH says of the probe that the prefix, or else the continuation, ran under."""

    phase: Phase
    noise: float = 0.0
    fail_after: int = 10**9
    probe: int = PLAN.full_row
    cached_by: int | None = None
    log: list[str] = field(default_factory=list)

    def set_probe(self, probe: int) -> None:
        self.probe = probe

    def flush(self) -> None:
        self.cached_by = None

    def prefill(self, windows: Sequence[Window]) -> int:
        assert self.cached_by is None
        self.cached_by = self.probe
        return sum(len(w.prefix) for w in windows)

    def score(self, windows: Sequence[Window], top_tokens: int = 0) -> Scored:
        self.fail_after -= 1
        if self.fail_after < 0:
            raise ProfileError("the server died")
        assert self.cached_by is not None
        if self.phase == "decode":
            assert self.cached_by == PLAN.full_row
            row = self.probe
        else:
            assert self.probe == PLAN.full_row
            row = self.cached_by
        self.log.append(f"{row}:{windows[0].prefix[0]}")
        return Scored(tuple(self._loss(row, w) for w in windows), 3 * len(windows))

    def next_losses(self, prefixes: Sequence[Sequence[int]], following: Sequence[int]) -> Scored:
        assert self.cached_by == PLAN.full_row
        windows = [Window(tuple(p[:3]), (t,)) for p, t in zip(prefixes, following, strict=True)]
        return Scored(tuple(self._loss(self.probe, w) for w in windows), len(windows))

    def _loss(self, row: int, window: Window) -> float:
        lost = sum(TRUTH[layer, int(k) - 1] for layer, k in enumerate(PLAN.rows[row]))
        wobble = self.noise * np.sin(7.0 * window.prefix[0] + row) * (row != PLAN.full_row)
        return 2.0 + 0.1 * window.prefix[0] + lost * (1 + wobble)


Make = Callable[..., Series]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make_series(phase: Phase = "decode", name: str = "layer", **settings: Any) -> Series:
        journal = ProfileJournal(tmp_path / "journal.jsonl", {"for": "tests"})
        chosen = replace(SETTINGS, **settings)
        return Series(f"{name}:{phase}", phase, PLAN, chosen, WINDOWS, journal)

    return make_series


def _run(series: Series, server: Any) -> np.ndarray:
    series.run(server, lambda _tokens, _left: None)
    return sensitivity_of(series.plan, series.losses())


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_losses_become_sensitivities(make: Make, phase: Phase) -> None:
    np.testing.assert_allclose(_run(make(phase), FormulaServer(phase)), TRUTH)


def test_a_prefix_at_full_quality_is_computed_once_for_all_probes(make: Make) -> None:
    series = make(relative_error=0.0, absolute_error_nats=0.0)
    _run(series, FormulaServer("decode", noise=0.5))
    chunks, probes = 4, 5
    assert series.forward_tokens() == chunks * (4 * 3 + probes * 4 * 3)


def test_probes_that_are_sure_are_measured_no_more(make: Make) -> None:
    server = FormulaServer("decode")
    _run(make(), server)
    reduced = [line for line in server.log if not line.startswith(f"{PLAN.full_row}:")]
    assert {int(line.split(":")[1]) for line in reduced} == {0, 4}


def test_probes_that_are_not_sure_get_every_window(make: Make) -> None:
    series = make(relative_error=0.0, absolute_error_nats=0.0)
    _run(series, FormulaServer("decode", noise=0.5))
    assert all(len(series.increases(probe)) == 16 for probe in range(PLAN.full_row))


@pytest.mark.parametrize("died_after", [0, 1, 4, 7])
def test_a_profile_that_was_interrupted_goes_on_to_the_same_result(
    make: Make, died_after: int
) -> None:
    with pytest.raises(ProfileError):
        _run(make(), FormulaServer("decode", noise=0.3, fail_after=died_after))
    second = FormulaServer("decode", noise=0.3)
    resumed = make()
    found = _run(resumed, second)
    assert len(resumed.journal.entries) == len(second.log) + died_after
    resumed.journal.path.unlink()
    np.testing.assert_array_equal(_run(make(), FormulaServer("decode", noise=0.3)), found)


def test_a_finished_series_asks_the_server_for_nothing(make: Make) -> None:
    _run(make(), FormulaServer("decode"))
    _run(make(), FormulaServer("decode", fail_after=0))


def test_mode_union_decodes_token_by_token(make: Make) -> None:
    series = make(name="union")
    np.testing.assert_allclose(_run(series, FormulaServer("decode")), TRUTH)
    assert series.journal.find("union:decode", 0, 0).forward_tokens == 4 * 3 + 2 * 4  # type: ignore[union-attr]


def test_perplexity_is_of_the_mean_loss(make: Make) -> None:
    series = make(metric="perplexity")
    full = np.exp(2.0 + 0.1 * np.mean(range(16)))
    expected = full * np.exp(TRUTH) - full
    np.testing.assert_allclose(_run(series, FormulaServer("decode")), expected)


def test_divergence_of_equal_distributions_is_zero() -> None:
    full = [{1: np.log(0.5), 2: np.log(0.25)}]
    assert mean_divergence(full, full) == pytest.approx(0.0)


def test_divergence_groups_what_is_not_listed() -> None:
    full = [{1: np.log(0.5), 2: np.log(0.25)}]
    found = [{1: np.log(0.25), 2: np.log(0.5)}]
    expected = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert mean_divergence(full, found) == pytest.approx(expected)
    assert mean_divergence(full, [{1: np.log(0.5), 3: np.log(0.1)}]) > 0


def test_a_plan_s_last_row_is_the_full_model() -> None:
    plan: ProbePlan = PLAN
    assert (plan.rows[plan.full_row] == 3).all()
