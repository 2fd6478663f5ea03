"""Real SGLang servers on the CPU for the integration tests, and tiny models to serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models

from sglang_alloc.shared_table import publish_shared_table


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny model of the named architecture."""
    made: dict[str, Path] = {}

    def folder_of(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("models") / architecture
            made[architecture] = tiny_models.make_model(architecture, folder)
        return made[architecture]

    return folder_of


@pytest.fixture
def tiny_table(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a function that publishes a shared table for a tiny model."""

    def publish(model_folder: Path) -> Path:
        path = tmp_path / f"{model_folder.name}.tbl"
        publish_shared_table(path, tiny_models.make_tables(model_folder))
        return path

    return publish
