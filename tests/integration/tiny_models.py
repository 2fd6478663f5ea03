"""Tiny random checkpoints of every architecture that SGLang serves on the CPU, and tables for them.

Random weights are enough here: these tests compare runs of the same model, not its quality.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.model_identity import identity_from_config

VOCABULARY = 264
LAYERS = 3
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def _qwen3_moe() -> tuple[type, PretrainedConfig]:
    return Qwen3MoeForCausalLM, Qwen3MoeConfig(
        **_COMMON, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32
    )


def _olmoe() -> tuple[type, PretrainedConfig]:
    return OlmoeForCausalLM, OlmoeConfig(
        **{**_COMMON, "num_key_value_heads": 4}, num_experts=16, num_experts_per_tok=4
    )


def _mixtral() -> tuple[type, PretrainedConfig]:
    return MixtralForCausalLM, MixtralConfig(
        **_COMMON, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
    )


def _glm4_moe() -> tuple[type, PretrainedConfig]:
    return Glm4MoeForCausalLM, Glm4MoeConfig(
        **_COMMON,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )


def _qwen3_dense() -> tuple[type, PretrainedConfig]:
    return Qwen3ForCausalLM, Qwen3Config(**_COMMON)


MOE_ARCHITECTURES = {
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "glm4_moe": _glm4_moe,
}
ARCHITECTURES = {**MOE_ARCHITECTURES, "qwen3_dense": _qwen3_dense}


def make_model(architecture: str, folder: Path) -> Path:
    """Write a random checkpoint with a byte-level tokenizer; return its folder."""
    model_class, config = ARCHITECTURES[architecture]()
    torch.manual_seed(1)
    model_class(config).save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def make_tables(model_folder: Path) -> BudgetTables:
    """Return uniform quotas, of `union` too, and arbitrary thresholds for every budget."""
    config = json.loads((model_folder / "config.json").read_text())
    identity = identity_from_config(config)
    first = int(config.get("first_k_dense_replace", 0))
    layer_ids = np.arange(first, LAYERS, dtype=np.int32)
    layers, top_k = len(layer_ids), identity.top_k
    budgets = np.arange(layers, layers * top_k + 1, dtype=np.int32)
    falling = np.linspace(0.6, 0.0, len(budgets), dtype=np.float32)
    quotas = ((budgets[:, None] + np.arange(layers)) // layers).astype(np.int16)
    return BudgetTables(
        model_id=model_folder.name,
        fingerprint=identity.fingerprint(),
        num_experts=identity.num_experts,
        top_k=top_k,
        layer_ids=layer_ids,
        budgets=budgets,
        quotas=quotas,
        predicted_loss=np.linspace(1.0, 0.0, len(budgets), dtype=np.float32),
        union_quotas=quotas,
        union_predicted_loss=np.linspace(0.5, 0.0, len(budgets), dtype=np.float32),
        thresholds=np.repeat(falling[:, None], layers, axis=1),
        provenance={"made_for": "tests"},
    )


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary |= {f"<|{index}|>": index for index in range(256, VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|256|>", eos_token="<|257|>"
    )
