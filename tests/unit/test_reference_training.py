"""A training run can be left and taken up without changing the model."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_factory import TINY_RECIPE, make_model, make_run, make_streams, silent_console

from sglang_alloc.reference.model_folder import write_loss_curve
from sglang_alloc.reference.recipe import learning_rate_at, training_windows
from sglang_alloc.reference.train import InterruptFlag, train
from sglang_alloc.reference.training_state import TrainingStateError


def _weights(run) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in run.model.state_dict().items()}


def _assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    uninterrupted = make_run(whole)
    assert train(uninterrupted, silent_console())
    for stop_after in (3, 7):
        assert not train(make_run(parts), silent_console(), stop_after=stop_after)
    resumed = make_run(parts)
    assert resumed.step == 7
    assert train(resumed, silent_console())
    _assert_identical(_weights(uninterrupted), _weights(resumed))


def test_number_of_workers_does_not_change_the_weights(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one.pt"), make_run(tmp_path / "two.pt")
    train(one, silent_console(), stop_after=4, workers=1)
    train(two, silent_console(), stop_after=4, workers=2)
    _assert_identical(_weights(one), _weights(two))


def test_training_lowers_the_loss_of_a_repeated_text(tmp_path: Path) -> None:
    streams = make_streams()
    for stream in streams.train.values():
        stream[:] = np.resize(np.frombuffer(b"abcdefgh", dtype=np.uint8), len(stream))
    run = make_run(tmp_path / "run.pt", streams=streams)
    with ThreadPoolExecutor(1) as executor:
        run.advance(executor)
        first = run.report(measure_heldout=True)
        while not run.complete:
            run.advance(executor)
    assert set(first.heldout or {}) == {"code", "man"}
    assert run.report(measure_heldout=False).train_loss < first.train_loss


def test_interrupt_is_noted_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with InterruptFlag() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.seen
    assert signal.getsignal(signal.SIGINT) is before


def test_run_of_another_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(make_run(path), silent_console(), stop_after=1)
    with pytest.raises(TrainingStateError, match="--restart"):
        make_run(path, replace(TINY_RECIPE, seed=1))


def test_windows_depend_on_seed_and_step_alone() -> None:
    train_streams = make_streams().train
    first = training_windows(train_streams, TINY_RECIPE, 5)
    assert torch.equal(first, training_windows(train_streams, TINY_RECIPE, 5))
    assert not torch.equal(first, training_windows(train_streams, TINY_RECIPE, 4))
    assert training_windows(train_streams, TINY_RECIPE, 6).shape == (2, 33)


def test_learning_rate_warms_up_and_ends_at_its_floor() -> None:
    rates = [learning_rate_at(TINY_RECIPE, step) for step in range(TINY_RECIPE.total_steps + 1)]
    assert rates[0] < rates[1] == max(rates)
    floor = TINY_RECIPE.learning_rate * TINY_RECIPE.final_learning_rate_ratio
    assert rates[-1] == pytest.approx(floor)


def test_tokens_before_a_step_count_both_phases() -> None:
    assert [TINY_RECIPE.tokens_before(s) for s in (0, 6, 10)] == [0, 6 * 32, 6 * 32 + 4 * 64]


def test_even_routing_has_balance_loss_one() -> None:
    model = make_model()
    for layer in model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    output = model(torch.zeros(1, 8, dtype=torch.int64))
    assert output.balance_loss.item() == pytest.approx(1.0)


def test_loss_curve_leaves_unmeasured_points_empty(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run.pt")
    with ThreadPoolExecutor(1) as executor:
        run.advance(executor)
        rows = [run.report(measure_heldout=True)]
        run.advance(executor)
        rows.append(run.report(measure_heldout=False))
    write_loss_curve(tmp_path / "curve.csv", rows, ("code", "man"))
    header, first, second = (tmp_path / "curve.csv").read_text().splitlines()
    assert header.endswith("heldout_code_loss,heldout_man_loss")
    assert not first.endswith(",,")
    assert second.endswith(",,")
