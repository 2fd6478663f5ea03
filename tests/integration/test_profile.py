"""Profiling through real servers, against the same measurements inside this process.

The reference model is small enough to be run here in plain torch, with the same rules: what the
engine measures has to agree with that, under one rank and under two.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sglang_alloc.calibrate_engine import split_windows
from sglang_alloc.calibrate_run import Calibration, run_calibration
from sglang_alloc.calibrate_thresholds import anchor_rows
from sglang_alloc.moe_layers import read_model_folder
from sglang_alloc.profile_plan import falling_to_zero
from sglang_alloc.profile_run import Profile, run_profile
from sglang_alloc.profile_settings import ProfileJob, ProfileSettings
from sglang_alloc.profile_windows import Window, cut_windows
from sglang_alloc.reference.allocations import (
    KeptCounter,
    layer_allocation,
    referenced,
    threshold_allocation,
)
from sglang_alloc.reference.export import load_checkpoint
from sglang_alloc.reference.gains import gained
from sglang_alloc.reference.heldout import token_losses
from sglang_alloc.reference.model import ReferenceModel
from sglang_alloc.reference.samples import read_sample
from sglang_alloc.reference.thresholds import calibrate_thresholds, measure_saliency
from sglang_alloc.server_runs.reference_files import MODEL, REFERENCE
from sglang_alloc.solve_bounds import QuotaBounds

pytestmark = pytest.mark.server

LAYERS, TOP_K = 5, 8
ANCHORS = 6
DOMAIN = "code"
TEXT = (REFERENCE / "samples" / f"calibration_{DOMAIN}.txt").read_text()
EXACT = ("--dtype", "float32", "--skip-server-warmup")
TWO_RANKS = (*EXACT, "--tp-size", "2")


class Silent:
    """A progress that nobody watches, and that checks itself."""

    def stage(self, name: str, total_tokens: int) -> None:
        self.left = total_tokens

    def advance(self, tokens: int, tokens_left: int) -> None:
        assert tokens > 0
        assert tokens_left <= self.left
        self.left = tokens_left

    def wait(self, text: str) -> None:
        """Nothing to say."""


def _job(folder: Path, arguments: tuple[str, ...], settings: ProfileSettings) -> ProfileJob:
    return ProfileJob(read_model_folder(MODEL), "reference", (TEXT,), folder, arguments, settings)


@pytest.fixture(scope="module")
def model() -> Iterator[ReferenceModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would spin against whatever else runs
    yield load_checkpoint(MODEL)
    torch.set_num_threads(threads)


PLAIN = ProfileSettings(
    phases=("decode", "prefill"),
    windows=8,
    prefix_tokens=96,
    continuation_tokens=64,
    measured=(1, 3),
    relative_error=0.0,
    absolute_error_nats=0.0,
)
UNDER_THRESHOLDS = ProfileSettings(
    modes=("threshold",), phases=("decode",), windows=8, prefix_tokens=192,
    continuation_tokens=64, measured=(1.0, 2.5),
)  # fmt: skip

CALIBRATING = ProfileSettings(
    windows=12, prefix_tokens=511, continuation_tokens=1, chunk_windows=12
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return run_profile(_job(tmp_path_factory.mktemp("plain"), EXACT, PLAIN), Silent())


@pytest.fixture(scope="module")
def calibrated_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two_ranks(
    calibrated_in: Path,
) -> Iterator[tuple[Profile, Calibration]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
        job = _job(calibrated_in, TWO_RANKS, UNDER_THRESHOLDS)
        profile = run_profile(job, Silent())
        bounds = QuotaBounds.uniform(LAYERS, 1, TOP_K)
        calibrating = _job(calibrated_in, EXACT, CALIBRATING)
        yield (
            profile,
            run_calibration(
                calibrating, profile.sensitivities, bounds, Silent(), anchor_count=ANCHORS
            ),
        )


def _cut(settings: ProfileSettings) -> list[Window]:
    return cut_windows(
        [list(TEXT.encode())],
        settings.prefix_tokens,
        settings.continuation_tokens,
        settings.windows,
    )


def _windows(settings: ProfileSettings) -> Tensor:
    return torch.tensor([[*w.prefix, *w.continuation] for w in _cut(settings)])


def _loss_of_continuations(model: ReferenceModel, layer: int, k: int, reduced: slice) -> float:
    """Loss with one layer at k in the `reduced` positions of each window, above the full model's.

    Attention is causal, so keeping a prefix at full quality is masking the rule there.
    """
    windows = _windows(PLAIN)
    rule = layer_allocation([k if index == layer else TOP_K for index in range(LAYERS)])

    def within(index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mixed = weights.clone().view(-1, windows.shape[1] - 1, TOP_K)
        mixed[:, reduced] = rule(index, x, ids, weights).view_as(mixed)[:, reduced]
        return mixed.view_as(weights)

    scored = slice(PLAIN.prefix_tokens - 1, None)
    return float(
        (token_losses(model, windows, within) - token_losses(model, windows))[:, scored].mean()
    )


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_engine_measures_what_a_plain_pass_measures(
    plain: Profile, model: ReferenceModel, layer: int, phase: str
) -> None:
    # The prefix's last token is forwarded with the continuation.
    switch = PLAIN.prefix_tokens - 1
    positions = slice(switch, None) if phase == "decode" else slice(0, switch)
    found = plain.sensitivities.matrices()[
        "sensitivity" if phase == "decode" else "prefill_sensitivity"
    ]
    losses = [_loss_of_continuations(model, layer, k, positions) for k in (1, 3)]
    expected = falling_to_zero(np.array([*losses, 0.0]))
    np.testing.assert_allclose(found[layer, [0, 2, -1]], expected, atol=2e-5)


def test_a_reduced_prefix_costs_almost_nothing_and_the_last_layer_s_exactly_nothing(
    plain: Profile,
) -> None:
    prefill = plain.sensitivities.prefill_sensitivity
    assert prefill is not None
    # Nothing of a prefix but its keys and values is used again; the last experts come after them.
    np.testing.assert_allclose(prefill[-1], 0, atol=1e-4)
    assert prefill.max() < plain.sensitivities.sensitivity.max() / 4


def test_the_cost_is_counted_in_forward_tokens(plain: Profile) -> None:
    probes, windows = 2 * LAYERS, PLAIN.windows
    # The prefix's last token is scored from, so it is forwarded again with the continuation.
    decode = windows * 96 + (probes + 1) * windows * 65
    prefill = (probes + 1) * windows * (96 + 65)
    assert plain.cost.forward_tokens == decode + prefill
    assert plain.cost.naive_tokens == 2 * LAYERS * TOP_K * windows * 160
    assert plain.sensitivities.provenance["forward_tokens"] == decode + prefill


def test_two_ranks_measure_the_saliency_of_the_whole_experts(
    two_ranks: tuple[Profile, Calibration], model: ReferenceModel
) -> None:
    windows = _windows(UNDER_THRESHOLDS)
    # The plain pass sees all tokens of a window but the last. Windows that begin alike share those
    # tokens in the server's prefix cache, so a few experts of the engine saw a token less.
    expected = measure_saliency(model, torch.cat([windows, windows[:, :1]], dim=1)).numpy()
    found = two_ranks[0].sensitivities.saliency
    assert found is not None
    errors = np.abs(found / expected - 1)
    assert np.quantile(errors, 0.8) < 1e-4
    assert errors.max() < 0.15


def test_losses_under_thresholds_fall_with_the_slots_kept(
    two_ranks: tuple[Profile, Calibration],
) -> None:
    losses = two_ranks[0].sensitivities.threshold_sensitivity
    assert losses is not None
    assert losses.shape == (LAYERS, 2 * TOP_K - 1)
    assert (np.diff(losses, axis=1) <= 1e-12).all()
    assert (losses[:, 0] > 0).all()


@pytest.mark.parametrize("full_ratio", [1 / 3, 1 / 2, 2 / 3, 5 / 6])
def test_calibrated_thresholds_keep_their_budget_on_held_out_text(
    two_ranks: tuple[Profile, Calibration], model: ReferenceModel, full_ratio: float
) -> None:
    tables = two_ranks[1].tables
    assert tables.thresholds is not None
    assert tables.threshold_quotas is not None
    row = round(full_ratio * LAYERS * TOP_K) - tables.budget_min
    heldout = torch.from_numpy(read_sample("heldout")[DOMAIN][: 40 * 512].astype(np.int64))
    saliency = torch.from_numpy(tables.saliency).float()
    allocation = threshold_allocation(tables.thresholds[row].tolist(), saliency)
    if tables.references is not None:
        allocation = referenced(allocation, tables.references[row].tolist(), saliency)
    if tables.gains is not None:
        allocation = gained(allocation, tables.gains[row].tolist())
    counter = KeptCounter(allocation, LAYERS)
    token_losses(model, heldout.view(-1, 512), counter)
    kept, wanted = float(counter.mean_kept.sum()), float(tables.threshold_quotas[row].sum())
    assert kept == pytest.approx(wanted, rel=0.03)  # from nine windows
    error = two_ranks[1].heldout_error
    assert error is not None
    assert error < 0.1  # three held-out windows


def test_the_engine_finds_the_gains_that_a_plain_pass_finds(
    two_ranks: tuple[Profile, Calibration], calibrated_in: Path, model: ReferenceModel
) -> None:
    tables, anchor = two_ranks[1].tables, 2
    assert tables.threshold_quotas is not None
    row = anchor_rows(len(tables.budgets), ANCHORS)[anchor]
    calibration, _ = split_windows(_cut(CALIBRATING))
    windows = torch.tensor([[*w.prefix, *w.continuation] for w in calibration])
    expected = calibrate_thresholds(
        model,
        torch.cat([windows, windows[:, :1]], dim=1),
        torch.from_numpy(tables.saliency).float(),
        tables.threshold_quotas[row].tolist(),
        reference=TOP_K if tables.references is None else int(tables.references[row, 0]),
        with_gains=True,
    )
    # Of each anchor one record of the text that is calibrated on, and one of what is held out.
    records = sorted(calibrated_in.glob("gains-*.npz"), key=lambda p: int(p.stem.split("-")[1]))
    with np.load(records[2 * anchor]) as record:
        np.testing.assert_allclose(record["gains"], expected.gains, atol=0.01)
    assert len(records) == 2 * ANCHORS


def test_a_correction_lowers_the_loss_that_the_engine_measures(
    two_ranks: tuple[Profile, Calibration],
) -> None:
    found: Any = two_ranks[1].tables.provenance["correction_losses"]
    assert len(found) == 3
    small = [losses for budget, losses in found.items() if int(budget) <= LAYERS * TOP_K // 2]
    assert len(small) == 2  # above half, a few windows cannot tell
    for losses in small:
        assert min(losses["references"], losses["both"]) < losses["none"]
    assert two_ranks[1].tables.references is not None
