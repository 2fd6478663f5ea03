"""One fingerprint per model, whichever way its configuration was read."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from sglang_alloc.errors import NotMoEError
from sglang_alloc.model_identity import ModelIdentity, identity_from_config

COMMON = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "vocab_size": 264,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {"intermediate_size": 96, "moe_intermediate_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", "num_experts": 16} | WIDE,
    "OlmoeForCausalLM": {"model_type": "olmoe", "num_experts": 16, "intermediate_size": 48},
    "MixtralForCausalLM": {
        "model_type": "mixtral",
        "num_local_experts": 16,
        "intermediate_size": 48,
    },
    "Glm4MoeForCausalLM": {"model_type": "glm4_moe", "n_routed_experts": 16} | WIDE,
    "DeepseekV3ForCausalLM": {"model_type": "deepseek_v3", "n_routed_experts": 16} | WIDE,
}


def _config(architecture: str) -> dict[str, Any]:
    return {"architectures": [architecture]} | COMMON | CONFIGS[architecture]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_each_spelling_of_the_keys_is_read(architecture: str) -> None:
    assert identity_from_config(_config(architecture)) == ModelIdentity(
        architecture, 4, 64, 16, 2, 48, 264
    )


@pytest.mark.parametrize("architecture", CONFIGS)
def test_file_and_transformers_object_have_one_fingerprint(
    architecture: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_config(architecture)))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    expected = identity_from_config(_config(architecture)).fingerprint()
    assert identity_from_config(loaded.to_dict()).fingerprint() == expected
    assert identity_from_config(saved).fingerprint() == expected


def test_numbers_nested_under_text_config_are_read() -> None:
    inner = {"model_type": "qwen3_moe", **COMMON, **CONFIGS["Qwen3MoeForCausalLM"]}
    config = {"architectures": ["Qwen3VLMoe"], "text_config": inner, "hidden_size": 1}
    assert identity_from_config(config) == ModelIdentity("Qwen3VLMoe", 4, 64, 16, 2, 48, 264)


def test_a_configuration_without_architectures_goes_by_its_model_type() -> None:
    config = _config("OlmoeForCausalLM") | {"architectures": None}
    assert identity_from_config(config).architecture == "olmoe"


@pytest.mark.parametrize("experts", [{}, {"num_experts": None}, {"num_experts": 0}])
def test_a_dense_model_is_refused_by_name(experts: dict[str, Any]) -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "intermediate_size": 9} | COMMON | experts
    with pytest.raises(NotMoEError, match=r"Qwen3ForCausalLM .*routed experts"):
        identity_from_config(config)


@given(st.sampled_from(ModelIdentity._fields[1:]), st.integers(1, 10_000))
def test_every_number_counts_in_the_fingerprint(field: str, value: int) -> None:
    identity = identity_from_config(_config("Qwen3MoeForCausalLM"))
    changed = identity._replace(**{field: value})
    assert (changed.fingerprint() == identity.fingerprint()) == (changed == identity)


def test_the_fingerprint_never_changes_between_versions() -> None:
    identity = ModelIdentity("Qwen3MoeForCausalLM", 4, 64, 16, 2, 48, 264)
    assert identity.fingerprint() == PINNED


PINNED = "cc1c3c95c8f5bcc8626a0d273c569a759fb88d3a0bc99654293be77c333bb9df"
