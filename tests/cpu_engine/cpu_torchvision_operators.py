"""Let a torchvision built for CUDA be imported on a CPU torch, by declaring the operators it names.

Python runs `watch_for_torchvision` at start (from the .pth file beside this one). It must stay
cheap: torch is imported only when torchvision is.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

# torchvision registers Python kernels for these two while it is imported; it never calls them then.
OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_declared: list[object] = []  # the library must live as long as its operators


class TorchvisionFinder:
    """Finds torchvision as Python would, and has its operators declared before it runs."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        spec.loader = _DeclaringLoader(spec.loader.name, spec.loader.path)
        return spec


class _DeclaringLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        declare_missing_operators(Path(self.path).parent)
        super().exec_module(module)


def watch_for_torchvision() -> None:
    """Put the finder first, once."""
    if TorchvisionFinder not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionFinder)  # type: ignore[arg-type]


def declare_missing_operators(torchvision_folder: Path) -> bool:
    """Declare the operators unless torchvision's own library brings them; return whether it did.

    Without torch nothing is declared: torchvision's own import error is the better message.
    """
    try:
        import torch
    except ImportError:
        return False
    for library_file in torchvision_folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library_file))
        except OSError:
            continue  # built for CUDA, or for another torch
        return False
    if not _declared:
        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(operator + SIGNATURE)
        _declared.append(library)
    return True
