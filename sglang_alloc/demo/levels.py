"""Demo, step 4: the few pairs of budgets that stand for all those that tokens were served at."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from sglang_alloc.demo.heldout_loss import Level
from sglang_alloc.demo.served import ServedBudgets

LEVELS_MAX = 8


class _Group(NamedTuple):
    """Tokens with similar budgets: the sums of these over the tokens, and how many there are."""

    prefill_sum: int
    decode_sum: int
    tokens: int


def quantise(served: Sequence[ServedBudgets], full_budget: int) -> list[Level]:
    """Group the budgets of all output tokens into at most LEVELS_MAX levels; weights sum to 1.

    A token has the prefill budget of its request and the decode budget of its step; a first token
    comes from the prefill, so it has that budget twice. Tokens at full budget are a level of their
    own, exactly. Of the others the groups whose merging changes budgets least are merged until few
    are left; a group's level is its rounded mean. Loss bends upwards as a budget falls, so within a
    group the mean budget's loss is at most the mean loss: a slight understatement.
    """
    tokens_at: dict[tuple[int, int], int] = defaultdict(int)
    for request in served:
        for budget in (request.prefill_budget, *request.decode_budgets):
            tokens_at[request.prefill_budget, budget] += 1
    total = sum(tokens_at.values())
    full_tokens = tokens_at.pop((full_budget, full_budget), 0)
    levels = [Level(full_budget, full_budget, full_tokens / total)] if full_tokens else []
    groups = [
        _Group(prefill_budget * tokens, decode_budget * tokens, tokens)
        for (prefill_budget, decode_budget), tokens in tokens_at.items()
    ]
    found = [_level(group, total) for group in _merged(groups, LEVELS_MAX - 1)]
    return levels + sorted(found, key=_depth)


def _merged(groups: list[_Group], count: int) -> list[_Group]:
    """Merge two groups at a time until there are at most `count`."""
    while len(groups) > count:
        one, other = min(itertools.combinations(groups, 2), key=_cost)
        both = _Group(*(a + b for a, b in zip(one, other, strict=True)))
        groups = [group for group in groups if group is not one and group is not other] + [both]
    return groups


def _cost(pair: tuple[_Group, _Group]) -> float:
    """Return by how much the squared distances of tokens from their group's mean would grow."""
    one, other = pair
    prefill = one.prefill_sum / one.tokens - other.prefill_sum / other.tokens
    decode = one.decode_sum / one.tokens - other.decode_sum / other.tokens
    weight = one.tokens * other.tokens / (one.tokens + other.tokens)
    return weight * (prefill * prefill + decode * decode)


def _level(group: _Group, total: int) -> Level:
    return Level(
        round(group.prefill_sum / group.tokens),
        round(group.decode_sum / group.tokens),
        group.tokens / total,
    )


def _depth(level: Level) -> tuple[int, int]:
    return -(level.prefill_budget + level.decode_budget), -level.prefill_budget
