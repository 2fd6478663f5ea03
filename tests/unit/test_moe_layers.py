"""Telling the MoE layers of a checkpoint by the names of its weights."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from sglang_alloc.errors import ConfigurationError, NotMoEError
from sglang_alloc.moe_layers import read_model_folder, weights_digest

CONFIG = {
    "architectures": ["Glm4MoeForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "vocab_size": 264,
}


def _write(folder: Path, names: list[str], config: Any = CONFIG) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"__metadata__": {}, **{name: {} for name in names}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def test_dense_and_draft_layers_are_left_out(tmp_path: Path) -> None:
    names = [
        "model.layers.0.mlp.up_proj.weight",
        *(f"model.layers.{n}.mlp.experts.0.up_proj.weight" for n in (1, 2, 3)),
        "model.layers.0.mlp.shared_experts.up_proj.weight",
    ]
    assert read_model_folder(_write(tmp_path, names)).layer_ids == (1, 2)


def test_an_index_of_several_files_is_enough(tmp_path: Path) -> None:
    _write(tmp_path, [])
    weights = {"language_model.model.layers.2.block_sparse_moe.experts.7.w1.weight": "a"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    assert read_model_folder(tmp_path).layer_ids == (2,)


def test_a_checkpoint_without_experts_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, ["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(NotMoEError, match="nothing to profile"):
        read_model_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, struct.pack("<Q", 9) + b"{"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path, [])
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigurationError, match="cannot be listed"):
        read_model_folder(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"config\.json cannot be read: No such file or directory\. Give"
    ):
        read_model_folder(tmp_path)
    _write(tmp_path, [], config=[])
    with pytest.raises(ConfigurationError, match="not a JSON object"):
        read_model_folder(tmp_path)


def test_fine_tuned_weights_are_another_model(tmp_path: Path) -> None:
    _write(tmp_path, ["model.layers.1.mlp.experts.0.up_proj.weight"])
    before = weights_digest(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b" ")
    assert weights_digest(tmp_path) != before
