"""For every test: the tools of `make tools` come first, and Triton's own functions interpret.

Property tests state facts, not speed: a busy machine must not fail them.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

_TOOLS = Path(__file__).parents[1] / ".tools" / "bin"
_INTERPRETED = "TRITON_INTERPRET"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep SGLang's servers in one of the workers of `make test`, one file after the other.

    Beside each other they would share the cores, and some are judged by their latencies.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ServersApart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "servers" if file.startswith("tests/integration/") else file

    return ServersApart(config, log)


def pytest_configure() -> None:
    os.environ["PATH"] = os.pathsep.join((str(_TOOLS), os.environ.get("PATH", os.defpath)))
    if os.environ.get("KERNEL_TEST_DEVICE", "cpu") == "cpu":
        _import_interpreted_triton()


def _import_interpreted_triton() -> None:
    """Import Triton before any test module does.

    What kernels call of it (tl.sum, tl.cumsum) is settled at its import, like a kernel at its
    definition: imported without the variable, it cannot be called from tests/kernels. The variable
    must not stay, because servers under test would inherit it.
    """
    asked = os.environ.get(_INTERPRETED)
    os.environ[_INTERPRETED] = "1"
    import triton.language  # noqa: F401

    if asked is None:
        del os.environ[_INTERPRETED]


@pytest.fixture(scope="module")
def engine_topk() -> Any:
    """SGLang's real routing, which a CPU runs; its import warns of what a CPU lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.layers.moe import topk
    return topk
