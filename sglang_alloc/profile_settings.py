"""Offline story, profiling: what is measured, with which text and how precisely."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sglang_alloc.allocation_mode import Phase
from sglang_alloc.moe_layers import ModelFolder, weights_digest
from sglang_alloc.profile_plan import Context

ProfiledMode = Literal["layer", "threshold", "union"]
Metric = Literal["nll", "perplexity", "kl"]


@dataclass(frozen=True)
class ProfileSettings:
    """How a model is profiled; sizes in tokens and windows.

    A probe stops early once the standard error of its loss over the windows is at most
    `relative_error` of the loss or `absolute_error_nats`. `measured` are the counts of kept experts
    that are measured, None for the default few. `union_steps` is the length of the continuations
    that mode `union` decodes token by token, `chunk_windows` windows at once.
    """

    modes: tuple[ProfiledMode, ...] = ("layer",)
    phases: tuple[Phase, ...] = ("decode", "prefill")
    context: Context = "isolated"
    target_quota: float | None = None
    metric: Metric = "nll"
    windows: int = 32
    prefix_tokens: int = 384
    continuation_tokens: int = 128
    chunk_windows: int = 8
    measured: tuple[float, ...] | None = None
    relative_error: float = 0.1
    absolute_error_nats: float = 0.0005
    union_steps: int = 16

    def identity(self, model: ModelFolder, model_id: str, text: str) -> dict[str, object]:
        """Return what must be the same for two runs to be parts of one profile."""
        return {
            "model_id": model_id,
            "model_fingerprint": model.identity.fingerprint(),
            "weights_sha256": weights_digest(model.path),
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "context": self.context,
            "target_quota": self.target_quota,
            "metric": self.metric,
            "windows": self.windows,
            "prefix_tokens": self.prefix_tokens,
            "continuation_tokens": self.continuation_tokens,
            "chunk_windows": self.chunk_windows,
            "measured": self.measured,
            "union_steps": self.union_steps,
        }


@dataclass(frozen=True)
class ProfileJob:
    """One run of the profiler: a model, its calibration text, and where the work is kept."""

    model: ModelFolder
    model_id: str
    texts: tuple[str, ...]
    folder: Path
    server_arguments: tuple[str, ...]
    settings: ProfileSettings
