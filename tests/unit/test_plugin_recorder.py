"""The proof at start leaves no trace in SGLang's recorder of the distribution of experts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang_alloc.plugin_proof import unrecorded


@pytest.fixture
def recorder() -> Iterator[Any]:
    """SGLang's real recorder, recording, with a gatherer that notes what it is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.eplb import expert_distribution
        from sglang.srt.runtime_context import get_resources
    real = expert_distribution._ExpertDistributionRecorderReal
    recorder = real.__new__(real)
    recorder._disable_all, recorder._recording, recorder.seen = False, True, []
    recorder._record_current_pass = True
    recorder._current_debug_name = recorder._current_layer_idx = expert_distribution.Withable()
    recorder._accumulator = _Accumulator()
    recorder._single_pass_gatherers = {"primary": _Gatherer(recorder.seen)}
    resources = get_resources()
    before, resources.expert_distribution_recorder = (
        resources.expert_distribution_recorder,
        recorder,
    )
    yield recorder
    resources.expert_distribution_recorder = before


class _Accumulator:
    def get_single_pass_gatherer_key(self, debug_name: str | None) -> str:
        return "primary"


class _Gatherer:
    def __init__(self, seen: list[list[list[int]]]) -> None:
        self._seen = seen

    def on_select_experts(self, layer_idx: int | None, topk_ids: torch.Tensor) -> None:
        self._seen.append(topk_ids.tolist())


def test_made_up_tokens_are_not_recorded_and_served_ones_are(recorder: Any) -> None:
    with unrecorded():
        recorder.on_select_experts(topk_ids=torch.tensor([[0, 1]]))
    assert recorder.seen == []
    recorder.on_select_experts(topk_ids=torch.tensor([[2, -1]]))
    assert recorder.seen == [[[2, -1]]]
