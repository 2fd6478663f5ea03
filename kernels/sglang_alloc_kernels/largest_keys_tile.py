"""Exact selection of the n largest keys without a sort, by radix, within one program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sortable_bits_tile(scores):
    """Return int64 keys 0 <= key < 2**32 in the order of float32 scores; NaN sorts like -inf."""
    numbers = tl.where(scores != scores, float("-inf"), scores)
    numbers = tl.where(numbers == 0, 0.0, numbers)  # -0 like 0
    bits = numbers.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000


@triton.jit
def pick_digit_tile(counts, wanted):
    """Return the digit that the wanted-th largest key has, and how many it still takes there.

    counts: (256,) keys by digit.
    """
    digits = tl.arange(0, 256)
    above = tl.sum(counts) - tl.cumsum(counts, 0)  # keys with a larger digit
    digit = tl.sum((above >= wanted).to(tl.int32))
    return digit, wanted - tl.sum(tl.where(digits > digit, counts, 0))


@triton.jit
def largest_keys_tile(keys, wanted, BITS: tl.constexpr):
    """Return which keys are among the `wanted` largest; ties go to the earlier key.

    keys: (N,) int64 below 2**BITS, negative where not a candidate; BITS: a multiple of 8.
    """
    prefix = tl.zeros_like(wanted).to(tl.int64)
    remaining = wanted
    for shift in tl.static_range(BITS - 8, -1, -8):
        matching = (keys >> (shift + 8)) == prefix
        counts = tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=matching)
        digit, remaining = pick_digit_tile(counts, remaining)
        prefix = prefix * 256 + digit
    return winning_keys_tile(keys, prefix, remaining, wanted)


@triton.jit
def winning_keys_tile(keys, last, remaining, wanted):
    """Return which keys win when `last` is the last winner's and `remaining` of its equals win."""
    level = keys == last
    first = tl.cumsum(level.to(tl.int32), 0) <= remaining
    asked = tl.zeros_like(keys) < wanted  # below one wanted key, the digits mean nothing
    return asked & (keys >= 0) & ((keys > last) | (level & first))
