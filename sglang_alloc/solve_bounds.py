"""Offline story, solving: the smallest and largest quota that each layer may get."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_alloc.errors import ConfigurationError

_OF_LAYER = re.compile(r"(?:(\d+)=)?(\d+)")


class QuotaBounds(NamedTuple):
    """Each layer's smallest and largest quota, both inclusive; equal ones pin the layer."""

    lower: npt.NDArray[np.intp]  # (L,)
    upper: npt.NDArray[np.intp]  # (L,)

    @classmethod
    def uniform(cls, num_layers: int, low: int, high: int) -> QuotaBounds:
        """Return the same bounds for every layer."""
        return cls(np.full(num_layers, low, np.intp), np.full(num_layers, high, np.intp))


def parse_bounds(
    layer_ids: Sequence[int],
    top_k: int,
    min_quota: Sequence[str] = (),
    max_quota: Sequence[str] = (),
    pin: Sequence[str] = (),
) -> QuotaBounds:
    """Read the options of `sglang-alloc solve`: `K` for all layers or `LAYER=K` for one.

    What is given for one layer counts more than what is given for all, and a pin most.

    Raises:
        ConfigurationError: an option is malformed, names a layer that is not a MoE layer or a
            quota outside 1..top_k, or two options contradict each other.
    """
    bounds = QuotaBounds.uniform(len(layer_ids), 1, top_k)
    for option, values, array in (
        ("--min-quota", min_quota, bounds.lower),
        ("--max-quota", max_quota, bounds.upper),
    ):
        for rows, quota in _general_first(option, values, layer_ids, top_k):
            array[rows] = quota
    _require_room(bounds, layer_ids)
    for rows, quota in _general_first("--pin", pin, layer_ids, top_k):
        if isinstance(rows, slice):
            raise ConfigurationError(f"--pin {quota} names no layer: give LAYER=K.")
        _require_pin_within(bounds, rows, quota, layer_ids[rows])
        bounds.lower[rows] = bounds.upper[rows] = quota
    return bounds


def require_bounds(bounds: QuotaBounds, num_layers: int, top_k: int) -> None:
    """Raise `ConfigurationError` unless every layer has a quota within 1..top_k left."""
    if bounds.lower.shape != (num_layers,) or bounds.upper.shape != (num_layers,):
        raise ConfigurationError(
            f"The quotas' bounds are for {bounds.lower.size} and {bounds.upper.size} layers and "
            f"the sensitivities for {num_layers}. Give bounds for each layer."
        )
    wrong = np.flatnonzero(
        (bounds.lower < 1) | (bounds.upper > top_k) | (bounds.lower > bounds.upper)
    )
    if wrong.size:
        row = int(wrong[0])
        raise ConfigurationError(
            f"Row {row} may have quotas from {bounds.lower[row]} to {bounds.upper[row]}, which "
            f"leaves none of 1 to {top_k}. Widen its bounds."
        )


def _general_first(
    option: str, values: Sequence[str], layer_ids: Sequence[int], top_k: int
) -> list[tuple[Any, int]]:
    """Return (rows, quota) of each value, those for all layers (a slice) before single ones."""
    parsed = [_parse(option, value, layer_ids, top_k) for value in values]
    return sorted(parsed, key=lambda item: not isinstance(item[0], slice))


def _parse(option: str, value: str, layer_ids: Sequence[int], top_k: int) -> tuple[Any, int]:
    match = _OF_LAYER.fullmatch(value.strip())
    if match is None:
        raise ConfigurationError(
            f"{option} {value} is not a quota: give K for every layer or LAYER=K for one, for "
            "example 3=2."
        )
    layer, quota = match[1], int(match[2])
    if not 1 <= quota <= top_k:
        raise ConfigurationError(
            f"{option} {value} asks for a quota of {quota}; a layer of this model keeps 1 to "
            f"{top_k} experts."
        )
    if layer is None:
        return slice(None), quota
    if int(layer) not in layer_ids:
        raise ConfigurationError(
            f"{option} {value} names layer {layer}, which is not among the MoE layers "
            f"{', '.join(map(str, layer_ids))}."
        )
    return list(layer_ids).index(int(layer)), quota


def _require_room(bounds: QuotaBounds, layer_ids: Sequence[int]) -> None:
    crossed = np.flatnonzero(bounds.lower > bounds.upper)
    if crossed.size:
        row = int(crossed[0])
        raise ConfigurationError(
            f"Layer {layer_ids[row]} is to keep at least {bounds.lower[row]} experts by "
            f"--min-quota and at most {bounds.upper[row]} by --max-quota: no quota is left. Lower "
            "the one or raise the other."
        )


def _require_pin_within(bounds: QuotaBounds, row: int, quota: int, layer: int) -> None:
    low, high = int(bounds.lower[row]), int(bounds.upper[row])
    if not low <= quota <= high:
        raise ConfigurationError(
            f"--pin {layer}={quota} contradicts the bounds of layer {layer}, {low} to {high}, by "
            "--min-quota, --max-quota or another --pin. Change one of them."
        )
