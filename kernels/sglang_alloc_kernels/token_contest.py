"""Mode `token` for more tokens than one program holds: a radix selection over several programs.

Every launch needs what all programs of the one before counted, so the launches are the barriers.
The counts are integers: their sums, and so the selection, do not depend on the programs' order, and
only a later launch reads them (an ordinary one: launched early, it would have to wait first).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_alloc_kernels.kept_slots_tile import (
    finish_slots_tile,
    load_slots_tile,
    score_slots_tile,
    store_slots_tile,
)
from sglang_alloc_kernels.kernel_launch import tokens_per_program
from sglang_alloc_kernels.largest_keys_tile import pick_digit_tile, winning_keys_tile
from sglang_alloc_kernels.slot_rank import best_slot_tile
from sglang_alloc_kernels.token_selection import (
    capped_slots_tile,
    contending_keys_tile,
    extra_slots_tile,
)

# Tokens in the contest, then keys by digit for each of four digits.
NUM_COUNTS = tl.constexpr(1 + 4 * 256)


def token_contest(
    arguments: tuple[Any, ...], constants: Mapping[str, int], num_tokens: int
) -> None:
    """Run the contest of `token_slots`: its kernel's arguments and constants, any number of tokens.

    Six launches after one that clears the counts; no host sync.
    """
    block_k = constants["BLOCK_K"]
    block_tokens = tokens_per_program(num_tokens, block_k)
    programs = triton.cdiv(num_tokens, block_tokens)
    device = arguments[0].device
    keys = torch.empty(programs * block_tokens * block_k, dtype=torch.int64, device=device)
    counts = torch.zeros(NUM_COUNTS.value + programs, dtype=torch.int32, device=device)
    limits, layer_index = arguments[4], arguments[-2]
    grid, block_keys = (programs,), block_tokens * block_k
    _contest_keys_kernel[grid](*arguments, keys, counts, **constants, BLOCK_T=block_tokens)
    for passes in (1, 2, 3):
        _contest_digits_kernel[grid](keys, counts, limits, layer_index, passes, block_keys)
    _contest_ties_kernel[grid](keys, counts, limits, layer_index, block_keys)
    _contest_slots_kernel[grid](
        *arguments,
        *(keys, counts),
        **constants,
        BLOCK_T=block_tokens,
        BLOCK_PROGRAMS=triton.next_power_of_2(programs),
    )


@triton.jit
def contest_level_tile(counts_ptr, limits_ptr, layer_index, PASSES: tl.constexpr):
    """Return the leading digits of the last key that wins, and how many win at that prefix."""
    wanted = extra_slots_tile(limits_ptr, layer_index, tl.load(counts_ptr))
    prefix = tl.zeros_like(wanted).to(tl.int64)
    remaining = wanted
    for digit_pass in tl.static_range(PASSES):
        counts = tl.load(counts_ptr + 1 + digit_pass * 256 + tl.arange(0, 256))
        digit, remaining = pick_digit_tile(counts, remaining)
        prefix = prefix * 256 + digit
    return prefix, remaining, wanted


@triton.jit
def add_digits_tile(counts_ptr, keys, prefix, PASSES: tl.constexpr):
    """Count the next digit of the keys that begin with `prefix`, for all programs."""
    matching = (keys >> (32 - 8 * PASSES)) == prefix
    digits = ((keys >> (24 - 8 * PASSES)) & 255).to(tl.int32)
    counts = tl.histogram(digits, 256, mask=matching)
    counts_ptr += 1 + PASSES * 256 + tl.arange(0, 256)
    tl.atomic_add(counts_ptr, counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["layer_index", "num_tokens"])
def _contest_keys_kernel(
    weights_ptr,  # (T, WIDTH)
    ids_ptr,  # (T, WIDTH)
    kept_weights_ptr,
    kept_ids_ptr,
    limits_ptr,
    gains_ptr,
    references_ptr,
    saliency_ptr,  # (L, E) or None
    num_valid_ptr,  # (1,) or None
    floors_ptr,  # (T,) or None
    ceilings_ptr,  # (T,) or None
    sums_ptr,
    lit_ptr,
    layer_index,
    num_tokens,
    keys_ptr,  # (programs * BLOCK_T * BLOCK_K,) int64 out
    counts_ptr,  # (NUM_COUNTS + programs,) int32, cleared
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the keys of BLOCK_T tokens, count the tokens in the contest and the first digit."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    weights, ids = load_slots_tile(
        weights_ptr, ids_ptr, tokens, num_tokens, num_valid_ptr, WIDTH, BLOCK_K
    )
    scores = score_slots_tile(weights, ids, saliency_ptr, layer_index, NUM_EXPERTS, TOP_K)
    keys, contending = contending_keys_tile(
        *(scores, best_slot_tile(scores), ids, tokens, num_tokens),
        *(floors_ptr, ceilings_ptr, TOP_K),
    )
    keys = tl.reshape(keys, [BLOCK_T * BLOCK_K])
    places = tl.program_id(0) * BLOCK_T * BLOCK_K + tl.arange(0, BLOCK_T * BLOCK_K)
    tl.store(keys_ptr + places, keys)
    tl.atomic_add(counts_ptr, tl.sum(contending.to(tl.int32)), sem="relaxed")
    add_digits_tile(counts_ptr, keys, 0, 0)


@triton.jit(do_not_specialize=["layer_index"])
def _contest_digits_kernel(
    keys_ptr,  # (programs * BLOCK,) int64
    counts_ptr,  # (NUM_COUNTS + programs,) int32
    limits_ptr,  # (L,) float32
    layer_index,
    PASSES: tl.constexpr,  # digits that are decided
    BLOCK: tl.constexpr,
):
    """Count the next digit of the keys that share the leading digits of the last winner."""
    prefix, _remaining, _wanted = contest_level_tile(counts_ptr, limits_ptr, layer_index, PASSES)
    keys = tl.load(keys_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    add_digits_tile(counts_ptr, keys, prefix, PASSES)


@triton.jit(do_not_specialize=["layer_index"])
def _contest_ties_kernel(
    keys_ptr,  # (programs * BLOCK,) int64
    counts_ptr,  # (NUM_COUNTS + programs,) int32
    limits_ptr,  # (L,) float32
    layer_index,
    BLOCK: tl.constexpr,
):
    """Count this program's keys that equal the last winner's, behind the digits' counts."""
    last, _remaining, _wanted = contest_level_tile(counts_ptr, limits_ptr, layer_index, 4)
    keys = tl.load(keys_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(counts_ptr + NUM_COUNTS + tl.program_id(0), tl.sum((keys == last).to(tl.int32)))


@triton.jit(do_not_specialize=["layer_index", "num_tokens"])
def _contest_slots_kernel(
    weights_ptr,  # (T, WIDTH)
    ids_ptr,  # (T, WIDTH)
    kept_weights_ptr,  # (T, WIDTH) out
    kept_ids_ptr,  # (T, WIDTH) out
    limits_ptr,  # (L,) float32
    gains_ptr,  # (L,) float32 or None
    references_ptr,  # (L,) float32 or None
    saliency_ptr,  # (L, E) float32 or None
    num_valid_ptr,  # (1,) int32 or None
    floors_ptr,  # (T,) int32 or None
    ceilings_ptr,  # (T,) int32 or None
    sums_ptr,  # (L, 4) float32 or None
    lit_ptr,  # (L, E) int8 or None
    layer_index,
    num_tokens,
    keys_ptr,  # (programs * BLOCK_T * BLOCK_K,) int64
    counts_ptr,  # (NUM_COUNTS + programs,) int32
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
    """Keep the winners among BLOCK_T tokens' slots; of equal keys, the earlier ones."""
    program = tl.program_id(0)
    tokens = program * BLOCK_T + tl.arange(0, BLOCK_T)
    weights, ids = load_slots_tile(
        weights_ptr, ids_ptr, tokens, num_tokens, num_valid_ptr, WIDTH, BLOCK_K
    )
    scores = score_slots_tile(weights, ids, saliency_ptr, layer_index, NUM_EXPERTS, TOP_K)
    best = best_slot_tile(scores)
    _keys, contending = contending_keys_tile(
        scores, best, ids, tokens, num_tokens, floors_ptr, ceilings_ptr, TOP_K
    )
    last, remaining, wanted = contest_level_tile(counts_ptr, limits_ptr, layer_index, 4)
    programs = tl.arange(0, BLOCK_PROGRAMS)
    ties = tl.load(counts_ptr + NUM_COUNTS + programs, mask=programs < program, other=0)
    places = program * BLOCK_T * BLOCK_K + tl.arange(0, BLOCK_T * BLOCK_K)
    keys = tl.load(keys_ptr + places)
    won = winning_keys_tile(keys, last, remaining - tl.sum(ties), wanted)
    kept = tl.reshape(won, [BLOCK_T, BLOCK_K]) | (contending[:, None] & best)
    if ceilings_ptr is not None:
        kept = kept | capped_slots_tile(
            scores, tokens, num_tokens, limits_ptr, layer_index, ceilings_ptr, TOP_K
        )
    weights, ids = finish_slots_tile(
        *(weights, ids, scores, kept, tokens, num_tokens, layer_index),
        *(gains_ptr, references_ptr, floors_ptr, ceilings_ptr, sums_ptr, lit_ptr),
        *(NUM_EXPERTS, TOP_K),
    )
    store_slots_tile(
        kept_weights_ptr, kept_ids_ptr, weights, ids, tokens, num_tokens, WIDTH, BLOCK_K
    )
