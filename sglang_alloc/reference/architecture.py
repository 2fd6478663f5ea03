"""Reference model: its shape, for the two families, and the Hugging Face config that says so."""

from dataclasses import asdict, dataclass

from sglang_alloc.reference.tokenizer import END_OF_TEXT, PAD, VOCAB_SIZE

FAMILIES = ("qwen3_moe", "olmoe")


@dataclass(frozen=True)
class ReferenceConfig:
    """Shape of a reference model. Widths are in channels; every layer is an MoE layer.

    Qwen3-MoE renormalises the top-k weights and normalises queries and keys per head; OLMoE does
    not renormalise and normalises them over all heads at once.
    """

    family: str = "qwen3_moe"
    num_layers: int = 5
    hidden_size: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    num_experts: int = 64
    top_k: int = 8
    moe_intermediate_size: int = 24  # a multiple of 8: SGLang's GPU activation kernels need it
    vocab_size: int = VOCAB_SIZE
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    max_positions: int = 4_096

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} asked for; known families are {FAMILIES}")

    @property
    def norm_topk_prob(self) -> bool:
        return self.family == "qwen3_moe"

    @property
    def query_norm_size(self) -> int:
        """Channels that one query norm covers."""
        return self.head_dim * (1 if self.family == "qwen3_moe" else self.num_heads)

    @property
    def key_norm_size(self) -> int:
        """Channels that one key norm covers."""
        return self.head_dim * (1 if self.family == "qwen3_moe" else self.num_kv_heads)


def reference_config(family: str) -> ReferenceConfig:
    """The shape that is trained for a family: the second differs in depth, width and top-k too.

    SGLang's OLMoE normalises keys over the whole hidden size with an epsilon of 1e-5, so it serves
    only as many key heads as query heads and only that epsilon.
    """
    if family == "olmoe":
        return ReferenceConfig(
            family, num_layers=6, num_kv_heads=4, num_experts=32, top_k=6, rms_norm_eps=1e-5
        )
    return ReferenceConfig(family)


def config_to_dict(config: ReferenceConfig) -> dict[str, object]:
    """Fields of the config, for the recipe."""
    return asdict(config)


def huggingface_config(config: ReferenceConfig) -> dict[str, object]:
    """The `config.json` that transformers and SGLang read."""
    shared: dict[str, object] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "norm_topk_prob": config.norm_topk_prob,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        # Trained as one matrix and stored twice: SGLang's models of these families do not tie.
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
    }
    if config.family == "olmoe":
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "intermediate_size": config.moe_intermediate_size,
            "clip_qkv": None,
            **shared,
        }
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": config.head_dim,
        "moe_intermediate_size": config.moe_intermediate_size,
        "intermediate_size": config.moe_intermediate_size * config.top_k,  # no dense layer uses it
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **shared,
    }
