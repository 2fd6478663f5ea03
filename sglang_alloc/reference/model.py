"""Reference model: a small Qwen3-MoE or OLMoE in plain torch, whose routing can be reduced."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sglang_alloc.reference.architecture import ReferenceConfig
from sglang_alloc.reference.experts import run_experts

# (layer, hidden_states (T, H), topk_ids (T, K), topk_weights (T, K)) -> the weights to use, in
# which 0 drops a slot. Slots come in descending weight.
Allocation = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Output(NamedTuple):
    """logits (B, S, V); balance_loss scalar, 1.0 when every layer loads its experts evenly."""

    logits: Tensor
    balance_loss: Tensor


class LayerCache:
    """Keys and values (B, heads, S, head_dim) of one layer, for the tokens seen so far."""

    def __init__(self) -> None:
        self._past: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        return 0 if self._past is None else self._past[0].shape[2]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all of them."""
        if self._past is not None:
            k, v = torch.cat([self._past[0], k], dim=2), torch.cat([self._past[1], v], dim=2)
        self._past = (k, v)
        return k, v


class Attention(nn.Module):
    """Grouped-query causal attention with normalised queries and keys, and rotary positions."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=False)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.query_norm_size, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.key_norm_size, eps=config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache | None = None
    ) -> Tensor:
        """Attend within x (B, S, H); with a cache that holds tokens, S is 1."""
        q = rotate(self._heads(self._normalised(self.q_proj(x), self.q_norm)), rotary)
        k = rotate(self._heads(self._normalised(self.k_proj(x), self.k_norm)), rotary)
        v = self._heads(self.v_proj(x))
        if cache is not None:
            assert cache.length == 0 or x.shape[1] == 1
            k, v = cache.extend(k, v)
        groups = self.config.num_heads // self.config.num_kv_heads
        mixed = functional.scaled_dot_product_attention(
            q,
            k.repeat_interleave(groups, dim=1),
            v.repeat_interleave(groups, dim=1),
            is_causal=x.shape[1] > 1,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _normalised(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        """Per head in Qwen3, over all heads in OLMoE: the norm's own size says which."""
        size = norm.normalized_shape[0]
        out: Tensor = norm(x.view(*x.shape[:-1], -1, size))
        return out.flatten(-2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.config.head_dim).transpose(1, 2)


class SparseMoe(nn.Module):
    """Softmax router over all experts, top-k of them per token."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden, inner = (
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return router probabilities (T, E), topk_ids (T, K) and topk_weights (T, K)."""
        probabilities = functional.softmax(self.gate(x), dim=-1)
        weights, ids = probabilities.topk(self.config.top_k, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return probabilities, ids, weights

    def forward(
        self, x: Tensor, layer: int, allocation: Allocation | None
    ) -> tuple[Tensor, Tensor]:
        """Map x (T, H) to (T, H), and say how unevenly the experts were used (>= about 1)."""
        probabilities, ids, weights = self.route(x)
        if allocation is not None:
            weights = allocation(layer, x, ids, weights)
        load = torch.bincount(ids.reshape(-1), minlength=self.config.num_experts) / ids.numel()
        balance = self.config.num_experts * (load * probabilities.mean(0)).sum()
        return run_experts(x, weights, self.gate_up, self.down, ids), balance


class Layer(nn.Module):
    """Attention, then experts, each on a normalised input and added back."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SparseMoe(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        layer: int,
        allocation: Allocation | None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        flat = self.post_attention_layernorm(x).flatten(0, 1)
        mixed, balance = self.mlp(flat, layer, allocation)
        return x + mixed.view_as(x), balance


class ReferenceModel(nn.Module):
    """The whole model; input and output embeddings are one matrix."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        tokens: Tensor,
        allocation: Allocation | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> Output:
        """Logits of each next token for tokens (B, S), int64.

        `caches`, one per layer, hold the tokens before these and take these in. They are filled
        once with any number of tokens, then one by one.
        """
        x, balances = self.embed_tokens(tokens), []
        for index in range(self.config.num_layers):
            cache = None if caches is None else caches[index]
            x, balance = self.run_layer(index, x, allocation, cache)
            balances.append(balance)
        return Output(self.logits(x), torch.stack(balances).mean())

    def run_layer(
        self,
        index: int,
        x: Tensor,
        allocation: Allocation | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S, H) behind layer `index`, and its balance loss."""
        start = 0 if cache is None else cache.length
        cos, sin = rotary_tables(self.config, start + x.shape[1], x.device)
        rotary = (cos[start:], sin[start:])
        x, balance = self.layers[index](x, rotary, index, allocation, cache)
        return x, balance

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, S, V) from the last layer's hidden states."""
        logits: Tensor = self.norm(x) @ self.embed_tokens.weight.T
        return logits


def rotary_tables(
    config: ReferenceConfig, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, head_dim) of rotary position embedding."""
    steps = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-steps / config.head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, heads, S, head_dim) by its positions."""
    low, high = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat([-high, low], dim=-1) * rotary[1]


def initialise(model: ReferenceModel, seed: int) -> None:
    """Draw starting weights: fan-in scaled, residual outputs smaller by sqrt(2 * layers)."""
    generator = torch.Generator().manual_seed(seed)
    residual = (2 * model.config.num_layers) ** -0.5
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            nn.init.ones_(weight)
            continue
        deviation = 0.02 if "embed" in name else weight.shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down")):
            deviation *= residual
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
