"""Bench, models without weights: the config.json of real ones, to be served with dummy weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.model_identity import identity_from_config
from sglang_alloc.solve import solve_all_budgets

# The values that set the shapes and the routing, as in the published configurations. DeepSeek-V3
# fits no single GPU: it is served with 5 of its 61 layers, in bfloat16.
CONFIGS: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "vocab_size": 102400,
        "max_position_embeddings": 32768,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 5,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "vocab_size": 129280,
        "max_position_embeddings": 32768,
    },
}
CONFIGS["small"] = CONFIGS["Qwen3-30B-A3B"] | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 512,
}
_COMMON = {
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write_model(folder: Path, name: str, **changes: Any) -> Path:
    """Write a folder that SGLang serves with `--load-format dummy --skip-tokenizer-init`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _COMMON | CONFIGS[name] | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def moe_layer_ids(config: dict[str, Any]) -> list[int]:
    """Return the numbers of the MoE layers."""
    return list(range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"]))


def even_tables(folder: Path) -> BudgetTables:
    """Return tables of a model folder whose quotas are as even as each budget allows."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    identity = identity_from_config(config)
    layers, top_k = moe_layer_ids(config), config["num_experts_per_tok"]
    # Convex, and a hair different from layer to layer, so that the spare slots go round.
    falling = 1.0 / np.arange(1, top_k + 1)
    sensitivity = np.outer(1.0 + 1e-3 * np.arange(len(layers)), falling)
    solution = solve_all_budgets(sensitivity)
    return BudgetTables(
        model_id=folder.name,
        fingerprint=identity.fingerprint(),
        num_experts=identity.num_experts,
        top_k=top_k,
        layer_ids=np.array(layers, dtype=np.int32),
        budgets=solution.budgets,
        quotas=solution.quotas,
        predicted_loss=solution.predicted_loss,
        union_quotas=solution.quotas,
        union_predicted_loss=solution.predicted_loss,
    )


def threshold_tables(folder: Path) -> BudgetTables:
    """Return tables of a model folder with thresholds that fit dummy weights.

    Such a router scores all experts nearly alike, so a token's K slots weigh the same and the
    saliency decides: each layer draws one per expert, and its threshold is the quantile that as
    many of a token's slots pass on average as the budget affords. That holds where a token's
    experts are a random choice; what was really kept is measured.
    """
    tables = even_tables(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers, top_k = tables.num_layers, tables.top_k
    saliency = np.random.default_rng(0).uniform(0.5, 1.5, (layers, tables.num_experts))
    means = tables.budgets / layers
    shares = np.linspace(0.0, 1.0, 10_001)
    kept = top_k * shares + (1.0 - shares) ** top_k  # the best slot stays even below the threshold
    passing = np.interp(means, kept, shares)
    slot_weight = _slot_weight(config)
    thresholds = slot_weight * np.quantile(saliency, 1.0 - passing, axis=1)
    thresholds[-1] = 0.0  # the full budget
    mean_quotas = np.repeat(means[:, None], layers, axis=1)
    return replace(
        tables,
        thresholds=thresholds.astype(np.float32),
        threshold_quotas=mean_quotas.astype(np.float32),
        threshold_predicted_loss=tables.predicted_loss,
        saliency=saliency.astype(np.float32),
    )


def _slot_weight(config: dict[str, Any]) -> float:
    """Return the weight of each slot where all experts score alike."""
    if config["norm_topk_prob"]:
        return 1.0 / float(config["num_experts_per_tok"])
    # Qwen's and DeepSeek's names of the same number.
    return 1.0 / float(config.get("num_experts") or config["n_routed_experts"])
