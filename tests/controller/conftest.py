"""Fixtures of the controller's tests."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

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
