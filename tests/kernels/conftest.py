"""Kernels run under Triton's interpreter here, or on the GPU with KERNEL_TEST_DEVICE=cuda."""

from __future__ import annotations

import os
import sys

import pytest

DEVICE = os.environ.get("KERNEL_TEST_DEVICE", "cpu")
_INTERPRETED = "TRITON_INTERPRET"
# Nothing captures graphs on a CPU.
collect_ignore = [] if DEVICE == "cuda" else ["test_cuda_graphs.py"]


def _forget_compiled_kernels() -> None:
    """Let the tests' imports define the kernels anew.

    Triton settles when a kernel is defined whether it is interpreted, and another folder's tests
    may have imported ours by now. The variable must not stay: servers under test would inherit it.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang_alloc_kernels"]:
        del sys.modules[name]


if DEVICE == "cpu":
    _forget_compiled_kernels()
    os.environ[_INTERPRETED] = "1"
    import sglang_alloc_kernels.step_statistics
    import sglang_alloc_kernels.token_slots
    import sglang_alloc_kernels.union_routing
    import sglang_alloc_kernels.union_slots  # noqa: F401

    del os.environ[_INTERPRETED]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv(_INTERPRETED, "1")


@pytest.fixture
def device() -> str:
    """Return the device that the kernels are tested on."""
    return DEVICE
