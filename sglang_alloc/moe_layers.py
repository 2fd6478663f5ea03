"""Offline story, before profiling: which model is this folder, and which of its layers are MoE?"""

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.errors import ConfigurationError, NotMoEError, reason_of
from sglang_alloc.model_identity import ModelIdentity, identity_from_config

_EXPERT_OF_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\..*\bexperts\b")
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_HEADER_BYTES_MAX = 100_000_000  # safetensors' own limit


class ModelFolder(NamedTuple):
    """A model on disk: its identity, and the numbers of its MoE layers, ascending."""

    path: Path
    identity: ModelIdentity
    layer_ids: tuple[int, ...]


def read_model_folder(path: Path) -> ModelFolder:
    """Read config.json and the names of the weights, from which the MoE layers are told.

    Raises:
        ConfigurationError: there is no readable config.json or no safetensors checkpoint.
        NotMoEError: the model is dense.
    """
    config_path = path / "config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise ConfigurationError(
            f"The model's {config_path} cannot be read: {reason}. Give the folder of a downloaded "
            "checkpoint."
        ) from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"The model's {config_path} is not a JSON object.")
    identity = identity_from_config(config)
    numbers = {
        int(match[1]) for name in _weight_names(path) if (match := _EXPERT_OF_LAYER.search(name))
    }
    # Layers past the model's own belong to a draft model in the same files.
    layer_ids = tuple(sorted(n for n in numbers if n < identity.num_hidden_layers))
    if not layer_ids:
        raise NotMoEError(
            f"No weight of {path} is an expert of a numbered layer, so there is nothing to "
            "profile. Give the folder of a MoE checkpoint."
        )
    return ModelFolder(path, identity, layer_ids)


def weights_digest(path: Path) -> str:
    """Return a SHA-256 of sizes and samples of the safetensors files: fine-tuning changes it.

    Reading all of a large checkpoint would take minutes; 64 samples of each file take none.
    """
    state = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        state.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            for part in range(_SAMPLES):
                stream.seek(size * part // _SAMPLES)
                state.update(stream.read(_SAMPLE_BYTES))
    return state.hexdigest()


def _weight_names(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    try:
        if index.is_file():
            return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        return [name for file in sorted(path.glob("*.safetensors")) for name in _names_in(file)]
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ConfigurationError(
            f"The weights of {path} cannot be listed ({error!r}): the MoE layers are read off the "
            "names in its safetensors files. Copy the checkpoint again."
        ) from error


def _names_in(file: Path) -> list[str]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _HEADER_BYTES_MAX:
            raise ValueError(f"{file.name} is no safetensors file")
        return [name for name in json.loads(stream.read(length)) if name != "__metadata__"]
