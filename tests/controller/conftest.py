"""Fixtures of the controller's tests."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from stand_in_server import StandInServer, serving
from virtual_loop import publish_table

from sglang_alloc.shared_table import SharedTable

RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture(autouse=True)
def _quiet_logs() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture
def recorded() -> Path:
    """The folder of metrics recorded from a real SGLang server; its README says how."""
    return RECORDED


@pytest.fixture
def table(tmp_path: Path) -> SharedTable:
    """A table at full budget that a controller can be given."""
    publish_table(tmp_path / "t.tbl")
    return SharedTable.open(tmp_path / "t.tbl")


@pytest.fixture
def server(recorded: Path) -> Iterator[StandInServer]:
    """A stand-in for a calm server."""
    with serving((recorded / "first.txt").read_text()) as server:
        yield server
