"""Servers that commands start: whether SGLang will take a CPU or a GPU, by its own rule."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence

from sglang_alloc.errors import ConfigurationError

CPU_ENGINE_VARIABLE = "SGLANG_USE_CPU_ENGINE"


def _finds_gpu() -> bool:
    import torch  # takes seconds, and is not needed where a device is named

    return torch.cuda.is_available()


def serves_on_cpu(
    arguments: Sequence[str],
    environment: Mapping[str, str] = os.environ,
    finds_gpu: Callable[[], bool] = _finds_gpu,
) -> bool:
    """Return whether SGLang will serve on a CPU, given its own arguments.

    The last `--device` counts; without one a CPU is taken where SGLANG_USE_CPU_ENGINE=1 asks for
    it or torch finds no GPU.

    Raises:
        ConfigurationError: `--device` names nothing.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--device")
    try:
        device = parser.parse_known_args(list(arguments))[0].device
    except argparse.ArgumentError as error:
        raise ConfigurationError(f"SGLang's arguments cannot be read: {error}.") from error
    if device is not None:
        return bool(device == "cpu")
    return environment.get(CPU_ENGINE_VARIABLE) == "1" or not finds_gpu()
