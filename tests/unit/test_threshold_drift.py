"""The slow correction of thresholds: its law, and a worker whose router has drifted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from table_factory import FINGERPRINT, make_tables

from sglang_alloc.budget_follower import BudgetChange
from sglang_alloc.enforcement import EnforcementTables, PhaseRows, RoutedSlots
from sglang_alloc.enforcement_device import DeviceEnforcement
from sglang_alloc.enforcement_host import HostEnforcement
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.shared_table import Selection, publish_shared_table
from sglang_alloc.threshold_drift import LIMIT, RATE, WINDOW_TOKENS, Kept, ThresholdDrift
from sglang_alloc.worker import ServedModel, Worker, make_enforcement
from sglang_alloc.worker_settings import WorkerSettings, settings_from_environment
from sglang_alloc_kernels.slot_rules import TWINS

LAYERS, TOP_K, EXPERTS = 3, 4, 8
FULL = LAYERS * TOP_K
BUDGET, QUOTA = 6, 2.0  # two slots in every layer
TOKENS = 2048
MODEL = ServedModel("tiny", FINGERPRINT, (1, 2, 3), TOP_K, EXPERTS, 0, "cpu")
BEGUN = Kept(0, np.zeros(LAYERS))


def _slots(seed: int, drift: float = 1.0) -> RoutedSlots:
    """Scores of a router; `drift` makes all of them larger than they were when calibrated."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(TOKENS, TOP_K, generator=generator).mul(0.7).exp() * drift
    weights = weights.sort(dim=1, descending=True).values
    return RoutedSlots(weights, torch.arange(TOP_K).repeat(TOKENS, 1), 0)


def _threshold() -> float:
    others = torch.cat([_slots(seed).weights[:, 1:].flatten() for seed in range(8)])
    return float(others.quantile(1 - (QUOTA - 1) / (TOP_K - 1)))


def _table(path: Path, *, says_quotas: bool = True) -> Path:
    budgets = np.arange(LAYERS, FULL + 1)
    quotas = np.repeat(budgets[:, None] / LAYERS, LAYERS, axis=1).astype(np.float32)
    thresholds = np.full_like(quotas, _threshold())
    thresholds[-1] = 0.0
    tables = make_tables(thresholds=thresholds, threshold_quotas=quotas if says_quotas else None)
    publish_shared_table(path, tables)
    return path


def _worker(path: Path, *, correct_drift: bool) -> Worker:
    worker = Worker(WorkerSettings(path, correct_drift=correct_drift))
    worker.bind(MODEL, make_enforcement(worker.table, worker.mode, "cpu"), metrics=None)
    return worker


@pytest.fixture
def make_worker(tmp_path: Path) -> Iterator[Callable[[bool], Worker]]:
    made: list[Worker] = []

    def make(correct_drift: bool) -> Worker:
        made.append(_worker(_table(tmp_path / "t.tbl"), correct_drift=correct_drift))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


def _serve(
    worker: Worker, budget: int, drift: float, forwards: int
) -> tuple[float, list[BudgetChange]]:
    """Prefill drifted batches; return the mean slots that a layer keeps at the end."""
    worker.apply(BudgetChange(Selection("override", 1, budget, budget), worker.rule))
    changes, kept = [], 0
    for number in range(forwards):
        change = worker.poll(time.monotonic_ns())
        if change is not None and change.factors is not None:
            changes.append(change)
            worker.apply(change)
        worker.begin_forward("prefill", TOKENS)
        for layer in range(LAYERS):
            slots = worker.route(layer, _slots(number * LAYERS + layer, drift))
            if number >= forwards - 8:
                kept += int((slots.ids >= 0).sum())
    return kept / (8 * LAYERS * TOKENS), changes


@pytest.fixture
def override(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the budgets that a test applies stand: nothing else is announced."""
    monkeypatch.setattr("sglang_alloc.worker.BudgetFollower.poll", lambda *_: None)


@pytest.mark.usefixtures("override")
@pytest.mark.parametrize("drift", [0.75, 1.4])
def test_a_drifted_router_is_brought_back_to_its_quota(
    make_worker: Callable[[bool], Worker], drift: float
) -> None:
    drifted, _ = _serve(make_worker(False), BUDGET, drift, 16)
    assert abs(drifted / QUOTA - 1) > 0.1
    corrected, changes = _serve(make_worker(True), BUDGET, drift, 120)
    assert corrected == pytest.approx(QUOTA, rel=0.02)
    assert changes


@pytest.mark.usefixtures("override")
def test_a_router_that_has_not_drifted_stays_at_its_quota(
    make_worker: Callable[[bool], Worker],
) -> None:
    kept, _ = _serve(make_worker(True), BUDGET, 1.0, 60)
    assert kept == pytest.approx(QUOTA, rel=0.01)


@pytest.mark.usefixtures("override")
def test_a_full_budget_is_never_corrected(make_worker: Callable[[bool], Worker]) -> None:
    kept, changes = _serve(make_worker(True), FULL, 1.4, 40)
    assert (kept, changes) == (TOP_K, [])


@pytest.mark.usefixtures("override")
def test_it_is_off_unless_switched_on(make_worker: Callable[[bool], Worker]) -> None:
    assert not WorkerSettings(Path("t.tbl")).correct_drift
    _, changes = _serve(make_worker(False), BUDGET, 1.4, 40)
    assert changes == []


@pytest.mark.usefixtures("override")
def test_every_rank_takes_the_leading_rank_s_factors(
    make_worker: Callable[[bool], Worker],
) -> None:
    leading, other = make_worker(True), make_worker(False)
    _, changes = _serve(leading, BUDGET, 1.4, 40)
    other.apply(changes[-1])
    other.begin_forward("prefill", TOKENS)
    assert torch.equal(other.route(0, _slots(99, 1.4)).ids, leading.route(0, _slots(99, 1.4)).ids)


def test_a_table_that_does_not_say_what_its_thresholds_keep_is_refused(tmp_path: Path) -> None:
    path = _table(tmp_path / "t.tbl", says_quotas=False)
    with pytest.raises(ConfigurationError, match="how many slots"):
        _worker(path, correct_drift=True)


@pytest.mark.parametrize(("text", "expected"), [("", False), ("0", False), ("1", True)])
def test_the_environment_switches_it(text: str, expected: bool) -> None:
    settings = settings_from_environment(
        {"SGLANG_ALLOC_TABLE": "t.tbl", "SGLANG_ALLOC_CORRECT_DRIFT": text}
    )
    assert settings is not None
    assert settings.correct_drift is expected


def test_an_unknown_word_is_no_switch() -> None:
    with pytest.raises(ConfigurationError, match="use 1 for on"):
        settings_from_environment(
            {"SGLANG_ALLOC_TABLE": "t.tbl", "SGLANG_ALLOC_CORRECT_DRIFT": "maybe"}
        )


def _tables(quotas: list[float]) -> EnforcementTables:
    """Two budgets of three layers: these quotas, and full."""
    means = np.array([quotas, [TOP_K] * LAYERS], np.float32)
    thresholds = np.array([[0.3] * LAYERS, [0.0] * LAYERS], np.float32)
    rows = PhaseRows(np.ceil(means).astype(np.int16), thresholds, None, None, means)
    return EnforcementTables("threshold", TOP_K, 1, 2, rows, rows, None, num_experts=EXPERTS)


def _log_factors(drift: ThresholdDrift) -> np.ndarray:
    return np.log(drift.factors()[1])


def test_the_step_is_the_relative_error_times_the_rate() -> None:
    drift = ThresholdDrift(_tables([2.0, 2.0, 3.0]), delayed=False)
    assert not drift.observe("decode", 1, BEGUN)
    means = np.array([2.2, 1.9, 3.0])
    assert drift.observe("decode", 1, Kept(WINDOW_TOKENS, means * WINDOW_TOKENS))
    np.testing.assert_allclose(_log_factors(drift), [RATE * 0.1, -RATE * 0.05, 0.0], atol=1e-12)
    assert drift.factors()[0] == (1.0, 1.0, 1.0)


def test_layers_that_keep_one_slot_or_all_are_left_alone() -> None:
    drift = ThresholdDrift(_tables([1.0, 4.0, 2.0]), delayed=False)
    drift.observe("decode", 1, BEGUN)
    drift.observe("decode", 1, Kept(WINDOW_TOKENS, np.full(LAYERS, 3.0 * WINDOW_TOKENS)))
    np.testing.assert_allclose(_log_factors(drift), [0, 0, RATE * 0.5], atol=1e-12)


def test_a_change_of_budget_begins_a_new_window() -> None:
    drift = ThresholdDrift(_tables([2.0, 2.0, 2.0]), delayed=False)
    drift.observe("decode", 2, BEGUN)
    later = Kept(WINDOW_TOKENS, np.full(LAYERS, 4.0 * WINDOW_TOKENS))
    assert not drift.observe("decode", 1, later)
    assert not drift.observe("decode", 1, later._replace(tokens=2 * WINDOW_TOKENS - 1))


def test_a_window_with_other_budgets_in_it_is_not_used() -> None:
    drift = ThresholdDrift(_tables([2.0, 2.0, 2.0]), delayed=False)
    drift.observe("decode", 1, BEGUN)
    drift.discard("decode")
    assert not drift.observe("decode", 1, Kept(WINDOW_TOKENS, np.full(LAYERS, 1e5)))


def test_delayed_measurements_are_let_settle_after_a_change_of_budget() -> None:
    drift = ThresholdDrift(_tables([2.0, 2.0, 2.0]), delayed=True)
    drift.observe("decode", 1, BEGUN)
    old = Kept(2 * WINDOW_TOKENS, np.full(LAYERS, 8.0 * WINDOW_TOKENS))
    assert not drift.observe("decode", 1, old)  # may be of the budget before
    new = Kept(3 * WINDOW_TOKENS, np.full(LAYERS, 10.2 * WINDOW_TOKENS))
    assert drift.observe("decode", 1, new)
    np.testing.assert_allclose(_log_factors(drift), RATE * 0.1)


def test_the_correction_is_bounded() -> None:
    drift = ThresholdDrift(_tables([2.0, 2.0, 2.0]), delayed=False)
    kept = BEGUN
    for _ in range(40):
        drift.observe("decode", 1, kept)
        slots = kept.slots + WINDOW_TOKENS * np.array([4.0, 1.0, 2.0])
        kept = Kept(kept.tokens + WINDOW_TOKENS, slots)
    np.testing.assert_allclose(_log_factors(drift), [LIMIT, -LIMIT, 0.0])


def test_host_and_device_take_the_same_factors() -> None:
    host = HostEnforcement(_tables([2.0, 2.0, 2.0]))
    device = DeviceEnforcement(_tables([2.0, 2.0, 2.0]), torch.device("cpu"), TWINS)
    before = device.addresses()
    for factors in ((1.0, 1.0, 1.0), (0.7, 1.0, 1.5), (2.0, 0.5, 1.0)):
        for one in (host, device):
            one.set_budgets(1, 1)
            one.set_threshold_factors((1.0, 1.0, 1.0), factors)
            one.begin_forward("decode")
        for layer in range(LAYERS):
            slots = _slots(layer)
            slots = slots._replace(weights=slots.weights / slots.weights.sum(1, keepdim=True))
            assert torch.equal(host.drop(layer, slots).ids, device.drop(layer, slots).ids)
    assert device.addresses() == before
