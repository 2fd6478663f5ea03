"""Stand-in for SGLang's compiled kernels on a CPU: the one function that its CPU engine calls.

Any other name can be imported, as SGLang does at import time, and says so when it is called.
Submodules do not exist: SGLang guards their import on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch import Tensor


def assign_req_to_token_pool_cpu(  # noqa: PLR0917 - SGLang passes all six by position
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
) -> None:
    """Write each request's new cache locations into its row of the request-to-token table.

    req_pool_indices: (B,) int, a row of the table per request; req_to_token: (R, pool_len) int32,
    written in place; start_offset, end_offset: (B,) int, the columns [start, end) of each request;
    out_cache_loc: (sum of end - start,) int, the locations of all requests one after another.
    """
    assert req_to_token.shape[1] == pool_len
    taken = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in rows:
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start]
        taken += end - start


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def not_on_this_cpu(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} is not in the CPU stand-in: this path needs SGLang's own kernels"
        )

    return not_on_this_cpu
