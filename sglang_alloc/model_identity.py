"""Which model a table belongs to: the numbers that its shape depends on, and their fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

from sglang_alloc.errors import NotMoEError

# One idea, many spellings: the first that is present and not null counts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
# Mixtral and OLMoE have no dense layers and call the experts' width just intermediate_size.
_EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_LAYERS = ("num_hidden_layers", "num_layers")


class ModelIdentity(NamedTuple):
    """What must agree between the model that was profiled and the model that is served."""

    architecture: str
    num_hidden_layers: int
    hidden_size: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    vocab_size: int

    def fingerprint(self) -> str:
        """Return the SHA-256 (64 hex digits) of the canonical JSON of these fields."""
        canonical = json.dumps(self._asdict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def identity_from_config(config: Mapping[str, object]) -> ModelIdentity:
    """Read the identity from a config.json or from a Hugging Face config's `to_dict()`.

    Both give the same identity: only keys that are written out in both are read. Multi-modal
    models keep theirs under `text_config`.

    Raises:
        NotMoEError: the model is dense, or the configuration lacks a number that a MoE has.
    """
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else {}
    architecture = _architecture(config, text)

    def number(names: tuple[str, ...]) -> int:
        for source in (text, config):
            for name in names:
                value = source.get(name)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        raise NotMoEError(
            f"{architecture} is not a Mixture-of-Experts model that sglang-alloc can read: its "
            f"configuration has no number under {' or '.join(names)}. An activation budget needs "
            "routed experts: serve a MoE model, or serve this one without sglang-alloc."
        )

    num_experts = number(_EXPERTS)
    if num_experts < 2:
        raise NotMoEError(
            f"{architecture} has {num_experts} routed experts, and an activation budget needs at "
            "least 2. Serve a MoE model, or serve this one without sglang-alloc."
        )
    return ModelIdentity(
        architecture=architecture,
        num_hidden_layers=number(_LAYERS),
        hidden_size=number(("hidden_size",)),
        num_experts=num_experts,
        top_k=number(_TOP_K),
        moe_intermediate_size=number(_EXPERT_WIDTH),
        vocab_size=number(("vocab_size",)),
    )


def _architecture(config: Mapping[str, object], text: Mapping[str, object]) -> str:
    for source in (config, text):
        names = source.get("architectures")
        if isinstance(names, list | tuple) and names:
            return str(names[0])
    return str(config.get("model_type") or text.get("model_type") or "This model")
