"""For every test: programs that `make tools` put into .tools come before the machine's own."""

from __future__ import annotations

import os
from pathlib import Path

_TOOLS = Path(__file__).parents[1] / ".tools" / "bin"


def pytest_configure() -> None:
    os.environ["PATH"] = os.pathsep.join((str(_TOOLS), os.environ.get("PATH", os.defpath)))
