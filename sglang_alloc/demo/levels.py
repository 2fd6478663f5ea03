"""Demo, step 4: the few pairs of budgets that stand for all those that requests were served at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sglang_alloc.demo.heldout_loss import Level
from sglang_alloc.demo.outcome import ServedBudgets

LEVELS_MAX = 6


def quantise(served: Sequence[ServedBudgets], full_budget: int) -> list[Level]:
    """Group the requests' budgets into at most LEVELS_MAX levels whose weights sum to 1.

    Requests at full budget are a level of their own, exactly. The others are sorted by the sum of
    their budgets and cut into groups of equal output tokens; a group's level is the rounded mean.
    Loss bends upwards as a budget falls, so within a group the mean budget's loss is at most the
    mean loss: a slight understatement, which six levels keep small.
    """
    tokens_at: dict[tuple[int, int], int] = defaultdict(int)
    for request in served:
        pair = (round(request.prefill_budget), round(request.decode_budget))
        tokens_at[pair] += request.output_tokens
    total = sum(tokens_at.values())
    full_tokens = tokens_at.pop((full_budget, full_budget), 0)
    levels = [Level(full_budget, full_budget, full_tokens / total)] if full_tokens else []
    for group in _equal_groups(sorted(tokens_at.items(), key=_depth), LEVELS_MAX - 1):
        levels.append(_mean_level(group, total))
    return levels


def _depth(entry: tuple[tuple[int, int], int]) -> tuple[int, int]:
    (prefill_budget, decode_budget), _ = entry
    return -(prefill_budget + decode_budget), -prefill_budget


Group = list[tuple[tuple[int, int], int]]


def _equal_groups(ordered: Group, count: int) -> list[Group]:
    """Cut into at most `count` runs of about equal weight; few distinct pairs stay apart."""
    if len(ordered) <= count:
        return [[entry] for entry in ordered]
    total = sum(weight for _, weight in ordered)
    groups: dict[int, Group] = defaultdict(list)
    before = 0
    for pair, weight in ordered:
        middle = before + weight / 2
        groups[min(count - 1, int(count * middle / total))].append((pair, weight))
        before += weight
    return list(groups.values())


def _mean_level(group: Group, total: int) -> Level:
    weight = sum(tokens for _, tokens in group)
    prefill = sum(pair[0] * tokens for pair, tokens in group) / weight
    decode = sum(pair[1] * tokens for pair, tokens in group) / weight
    return Level(round(prefill), round(decode), weight / total)
