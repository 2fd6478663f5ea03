"""Data story, step 8 on a GPU: what lets SGLang's Triton experts skip dropped slots, and no other.

The plugin's hook and the bench change the arguments of `TRITON_EXPERTS` here, both alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_alloc.compatibility import is_before
from sglang_alloc.compatibility_seams import DOWN_USES_TMA, SKIPS_UNASKED, ZEROS_IN_PLACE
from sglang_alloc.errors import UnsupportedServerError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# Why a server of an earlier release does not start on such experts; `server_check` says it, too.
ONE_FP8_SCALE = (
    "their FP8 activations are quantised by one scale for all rows, which before SGLang 0.5.23 is "
    "taken over memory that nobody wrote at dropped slots: upgrade SGLang, or serve weights whose "
    "activations are quantised by block, by token or by static scales"
)


def skip_dropped(args: tuple[Any, ...], kwargs: dict[str, Any], version: str) -> Arguments:
    """Return the arguments with which blocks of id -1 are skipped even if all experts are local.

    version: SGLang's. Before 0.5.23 the kernels also write zeros at the rows of a skipped block's
    slots, even into a buffer whose rows are sorted by expert, where these rows are other slots'.
    The buffer is sorted when the second product loads by TMA, so there it may not.

    `filter_expert` makes the activation leave dropped rows unwritten, too. One FP8 scale for all
    rows would be taken over what memory holds there, so such experts are not told: from 0.5.23 on
    the products skip in any case, and the activation of a zero row is zero. Raises
    UnsupportedServerError for them in an earlier release.
    """
    if _has_one_fp8_scale(kwargs):
        if is_before(version, SKIPS_UNASKED):
            raise UnsupportedServerError(
                f"the budget cannot hold on these experts: {ONE_FP8_SCALE}"
            )
        return _without_tma(args, kwargs)  # a sorted buffer has rows that nobody writes
    kwargs = {**kwargs, "filter_expert": True}
    return _without_tma(args, kwargs) if is_before(version, ZEROS_IN_PLACE) else (args, kwargs)


def _has_one_fp8_scale(kwargs: Mapping[str, Any]) -> bool:
    """Return whether the second product quantises its rows by one scale found on the way."""
    return (
        bool(kwargs.get("use_fp8_w8a8"))
        and kwargs.get("block_shape") is None
        and not kwargs.get("per_channel_quant")
        and kwargs.get("a2_scale") is None
    )


def _without_tma(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments with which the second product does not load by TMA."""
    if len(args) <= DOWN_USES_TMA:
        return args, {**kwargs, "down_moe_use_tma": False}
    return (*args[:DOWN_USES_TMA], False, *args[DOWN_USES_TMA + 1 :]), kwargs
