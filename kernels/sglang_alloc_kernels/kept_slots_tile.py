"""The steps that every kernel shares, on tiles (T, K) of one layer's slots; see `kept_slots.py`.

A tile's columns are the K routed slots, then the shared experts' columns, then filler.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_alloc_kernels.slot_rank import slot_rank_tile
from sglang_alloc_kernels.step_statistics import add_to_sums_tile


@triton.jit
def load_slots_tile(
    weights_ptr, ids_ptr, tokens, num_tokens, num_valid_ptr, WIDTH, BLOCK_K: tl.constexpr
):
    """Load the rows `tokens` (T,) of (num_tokens, WIDTH); padding has weight 0 and id -1."""
    columns = tl.arange(0, BLOCK_K)
    inside = (tokens < num_tokens)[:, None] & (columns < WIDTH)[None, :]
    places = tokens[:, None].to(tl.int64) * WIDTH + columns[None, :]
    weights = tl.load(weights_ptr + places, mask=inside, other=0.0).to(tl.float32)
    ids = tl.load(ids_ptr + places, mask=inside, other=-1).to(tl.int32)
    if num_valid_ptr is not None:
        # Behind the loads, which would otherwise begin only when this number has arrived.
        valid = (tokens < tl.load(num_valid_ptr))[:, None]
        weights, ids = tl.where(valid, weights, 0.0), tl.where(valid, ids, -1)
    return weights, ids


@triton.jit
def store_slots_tile(
    weights_ptr, ids_ptr, weights, ids, tokens, num_tokens, WIDTH, BLOCK_K: tl.constexpr
):
    """Store the rows `tokens` of (num_tokens, WIDTH)."""
    columns = tl.arange(0, BLOCK_K)
    inside = (tokens < num_tokens)[:, None] & (columns < WIDTH)[None, :]
    places = tokens[:, None].to(tl.int64) * WIDTH + columns[None, :]
    tl.store(weights_ptr + places, weights, mask=inside)
    tl.store(ids_ptr + places, ids, mask=inside)


@triton.jit
def score_slots_tile(weights, ids, saliency_ptr, layer_index, NUM_EXPERTS, TOP_K):
    """Return the scores: weight times saliency for routed slots that are present, else -inf."""
    present = (tl.arange(0, weights.shape[1]) < TOP_K)[None, :] & (ids >= 0)
    scores = weights
    if saliency_ptr is not None:
        scores *= tl.load(saliency_ptr + layer_index * NUM_EXPERTS + ids, mask=present, other=0.0)
    return tl.where(present, scores, float("-inf"))


@triton.jit
def load_bound_tile(bound_ptr, tokens, num_tokens):
    """Load each token's floor or ceiling, (T, 1)."""
    return tl.load(bound_ptr + tokens, mask=tokens < num_tokens, other=0)[:, None]


@triton.jit
def finish_slots_tile(
    weights,
    ids,
    scores,
    kept,
    tokens,
    num_tokens,
    layer_index,
    gains_ptr,
    references_ptr,
    floors_ptr,
    ceilings_ptr,
    sums_ptr,
    lit_ptr,
    NUM_EXPERTS,
    TOP_K,
):
    """Return (weights, ids) after floors, ceilings and corrections, as `finish_slots_torch`.

    Slots are ranked only where something asks for it.
    """
    routed = (tl.arange(0, weights.shape[1]) < TOP_K)[None, :]
    if (floors_ptr is not None) or (ceilings_ptr is not None) or (references_ptr is not None):
        ranks = slot_rank_tile(scores)
    if floors_ptr is not None:
        kept = kept | (ranks < load_bound_tile(floors_ptr, tokens, num_tokens))
    if ceilings_ptr is not None:
        kept = kept & (ranks < load_bound_tile(ceilings_ptr, tokens, num_tokens))
    kept = kept & routed & (ids >= 0)
    if sums_ptr is not None:
        add_to_sums_tile(sums_ptr, lit_ptr, layer_index, weights, ids, kept, routed, NUM_EXPERTS)
    scaled = weights
    if references_ptr is not None:
        mass = tl.where(routed & (ids >= 0) & (weights == weights), weights, 0.0)
        inside = kept | (ranks < tl.load(references_ptr + layer_index))
        reference = tl.sum(tl.where(inside, mass, 0.0), axis=1)
        # The two sums may be formed in different orders, so that 1 where nothing is outside is
        # decided, not computed: a full budget leaves every bit.
        some_outside = tl.max(((inside == 0) & (mass != 0)).to(tl.int32), axis=1) > 0
        scales = some_outside & (reference > 0)
        ratio = tl.sum(mass, axis=1) / tl.where(scales, reference, 1.0)
        ratio = tl.where(scales, ratio, 1.0)
        scaled *= ratio[:, None]
    if gains_ptr is not None:
        gain = tl.load(gains_ptr + layer_index)
        if floors_ptr is not None:
            protected = load_bound_tile(floors_ptr, tokens, num_tokens) >= TOP_K
            scaled *= tl.where(protected, 1.0, gain)
        else:
            scaled *= gain
    scaled = tl.where(kept, scaled, tl.where(routed, 0.0, weights))
    return scaled, tl.where(kept | ~routed, ids, -1)
