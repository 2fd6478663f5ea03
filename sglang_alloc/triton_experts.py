"""Data story, step 8 on a GPU: what lets SGLang's Triton experts skip dropped slots, and no other.

The plugin's hook and the bench change the arguments of `TRITON_EXPERTS` here, both alike.
"""

from __future__ import annotations

from typing import Any

from sglang_alloc.compatibility import is_before
from sglang_alloc.compatibility_seams import DOWN_USES_TMA, ZEROS_IN_PLACE

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def skip_dropped(args: tuple[Any, ...], kwargs: dict[str, Any], version: str) -> Arguments:
    """Return the arguments with which blocks of id -1 are skipped even if all experts are local.

    version: SGLang's. Before 0.5.23 the kernels also write zeros at the rows of a skipped block's
    slots, even into a buffer whose rows are sorted by expert, where these rows are other slots'.
    The buffer is sorted when the second product loads by TMA, so there it may not.
    """
    kwargs = {**kwargs, "filter_expert": True}
    if not is_before(version, ZEROS_IN_PLACE):
        return args, kwargs
    if len(args) <= DOWN_USES_TMA:
        return args, {**kwargs, "down_moe_use_tma": False}
    return (*args[:DOWN_USES_TMA], False, *args[DOWN_USES_TMA + 1 :]), kwargs
