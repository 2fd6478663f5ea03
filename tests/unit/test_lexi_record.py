"""Deviations on Gaussian input, against a layer whose outputs can be told by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from sglang_alloc.errors import UnsupportedServerError
from sglang_alloc.lexi_record import record_deviations


class _Routed(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


class _Experts(torch.nn.Module):
    """Every expert returns its input; dropped slots must have been announced."""

    def __init__(self) -> None:
        super().__init__()
        self.dropping = False

    def forward(self, x: torch.Tensor, slots: _Routed) -> torch.Tensor:
        assert self.dropping or bool((slots.topk_ids >= 0).all())
        return x.mul_(slots.topk_weights.sum(1, keepdim=True))


def _block(weights: list[float]) -> Any:
    def topk(x: torch.Tensor, _logits: torch.Tensor) -> _Routed:
        rows = torch.tensor(weights).repeat(len(x), 1)
        return _Routed(rows, torch.arange(len(weights)).repeat(len(x), 1))

    return SimpleNamespace(gate=torch.nn.Linear(64, 8), topk=topk, experts=_Experts())


def test_a_layer_moves_by_the_mass_it_drops(tmp_path: Path) -> None:
    blocks = [_block([0.5, 0.3, 0.2]), _block([0.8, 0.1, 0.1])]

    def dropping(value: bool) -> None:
        for block in blocks:
            block.experts.dropping = value

    record_deviations(blocks, 3, lambda partial: 2 * partial, dropping, tmp_path)
    with np.load(tmp_path / "lexi.npz") as record:
        found = record["deviations"]
    norm = 2 * 64**0.5  # of a Gaussian vector, over two ranks
    expected = norm * np.array([[0.5, 0.2, 0.0], [0.2, 0.1, 0.0]])
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_a_block_of_another_make_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedServerError, match="SimpleNamespace has no gate and no experts"):
        record_deviations([SimpleNamespace(topk=1)], 2, lambda x: x, lambda _d: None, tmp_path)
