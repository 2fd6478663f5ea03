"""Bench, the list of units: what is measured together, kept together and not done twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from moe_bench.shapes import SHAPES, SMALL, MoEShape

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUTING_BATCHES = (1, 8, 64, 512, 16384)
PREFILLS = (1024, 2048, 4096, 8192, 16384)
SMALL_BATCHES = (1, 8, 64)
KINDS = ("routing", "layer", "prefill", "server")
_SECONDS = {"routing": 15.0, "layer": 20.0, "prefill": 40.0, "server": 900.0}


class Unit(NamedTuple):
    """One kind of measurement of one shape at one number of tokens (0: the unit has its own)."""

    kind: str
    shape: MoEShape
    num_tokens: int

    @property
    def name(self) -> str:
        size = "" if self.kind == "server" else f", {self.num_tokens} tokens"
        return f"{self.kind}: {self.shape.name}{size}"

    @property
    def expected_seconds(self) -> float:
        if self.shape is not SMALL:
            return _SECONDS[self.kind]
        return 2.0 if self.kind != "server" else 300.0


def gpu_units(kinds: tuple[str, ...], shapes: tuple[str, ...]) -> list[Unit]:
    """Return the units of a GPU run, the quickest kinds first."""
    wanted = [shape for shape in SHAPES if shape.name in shapes]
    return [
        Unit(kind, shape, tokens)
        for kind in KINDS
        if kind in kinds
        for shape in wanted
        for tokens in _sizes(kind)
    ]


def cpu_units() -> list[Unit]:
    """Return what a CPU can run: the small shape's routing and layer by the torch twins, served."""
    by_size = [Unit(kind, SMALL, n) for kind in ("routing", "layer") for n in SMALL_BATCHES]
    return [*by_size, Unit("server", SMALL, 0)]


def _sizes(kind: str) -> Iterator[int]:
    sizes = {"routing": ROUTING_BATCHES, "layer": BATCHES, "prefill": PREFILLS}
    yield from sizes.get(kind, (0,))
