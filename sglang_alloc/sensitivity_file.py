"""Offline story, between profiling and solving: the sensitivities of a model on disk (.npz)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_alloc.errors import TableFormatError
from sglang_alloc.npz_file import read_npz, write_npz

Array = npt.NDArray[Any]

# Columns: K is one for each k = 1..K, C one for each half slot from 1 to K, E one for each expert.
MATRICES = {
    "sensitivity": "K",
    "prefill_sensitivity": "K",
    "union_sensitivity": "K",
    "threshold_sensitivity": "C",
    "prefill_threshold_sensitivity": "C",
    "saliency": "E",
}
HALF_SLOTS = 2


class ProfiledModel(NamedTuple):
    """Which model was profiled; without it sensitivities can be solved but not served."""

    model_id: str
    fingerprint: str
    num_experts: int
    layer_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """Loss in nats per token when one layer keeps k slots, every matrix float64 with L rows.

    `sensitivity[l, k - 1]` (L, K) is what decode pays in mode `layer`, `prefill_sensitivity` what
    the tokens after a reduced prefix pay, `union_sensitivity` what decode pays when the layer's
    top-k opens the step's set of experts. `threshold_sensitivity[l, c]` (L, 2K - 1) is for a
    threshold that keeps (c + 2) / 2 slots on average. `saliency` (L, E) is the mean norm of each
    expert's output.
    """

    sensitivity: Array
    prefill_sensitivity: Array | None = None
    union_sensitivity: Array | None = None
    threshold_sensitivity: Array | None = None
    prefill_threshold_sensitivity: Array | None = None
    saliency: Array | None = None
    model: ProfiledModel | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The MoE layers' numbers in the model, or their rows where the model is not known."""
        return self.model.layer_ids if self.model else tuple(range(len(self.sensitivity)))

    @property
    def top_k(self) -> int:
        """K, the model's top-k."""
        return int(self.sensitivity.shape[1])

    def matrices(self) -> dict[str, Array]:
        """Return the matrices that are present, by name."""
        return {n: getattr(self, n) for n in MATRICES if getattr(self, n) is not None}


def save_sensitivities(path: Path, sensitivities: Sensitivities) -> None:
    """Check and write `sensitivities` to `path` in one step.

    Raises:
        TableFormatError: a matrix is not what it should be, or the file cannot be written.
    """
    _check(sensitivities)
    fields: dict[str, Any] = dict(sensitivities.matrices())
    fields["provenance"] = np.str_(json.dumps(dict(sensitivities.provenance), sort_keys=True))
    if sensitivities.model is not None:
        fields["model_id"] = np.str_(sensitivities.model.model_id)
        fields["fingerprint"] = np.str_(sensitivities.model.fingerprint)
        fields["num_experts"] = np.int64(sensitivities.model.num_experts)
        fields["layer_ids"] = np.array(sensitivities.model.layer_ids, np.int32)
    write_npz(path, fields, "sensitivities")


def load_sensitivities(path: Path) -> Sensitivities:
    """Read and check the sensitivities in `path`; only `sensitivity` itself is required.

    Raises:
        TableFormatError: the file is missing, damaged, or holds what cannot be solved.
    """
    fields = read_npz(path, "sensitivities")
    if "sensitivity" not in fields:
        found = ", ".join(sorted(fields)) or "nothing"
        raise TableFormatError(
            f"{path} has no array `sensitivity` (MoE layers, top-k), only {found}. Profile the "
            "model, or save your own matrix under that name."
        )
    try:
        loaded = Sensitivities(
            **{name: _matrix(name, fields[name]) for name in MATRICES if name in fields},
            model=_model(fields),
            provenance=_provenance(fields),
        )
        _check(loaded)
    except TableFormatError as error:
        raise TableFormatError(f"{path} cannot be solved: {error}") from error
    return loaded


def _matrix(name: str, array: Array) -> Array:
    if array.dtype.kind not in "fiu":
        raise TableFormatError(f"{name}: expected numbers, found {array.dtype}.")
    return array.astype(np.float64)


def _model(fields: Mapping[str, Array]) -> ProfiledModel | None:
    if "fingerprint" not in fields:
        return None
    missing = {"model_id", "num_experts", "layer_ids"} - set(fields)
    if missing:
        raise TableFormatError(
            f"it has a fingerprint and no {', '.join(sorted(missing))}: profile again, or leave "
            "the fingerprint out."
        )
    return ProfiledModel(
        str(fields["model_id"]),
        str(fields["fingerprint"]),
        int(fields["num_experts"]),
        tuple(int(i) for i in fields["layer_ids"].ravel()),
    )


def _provenance(fields: Mapping[str, Array]) -> dict[str, object]:
    if "provenance" not in fields:
        return {}
    text = str(fields["provenance"])
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {"note": text}
    return found if isinstance(found, dict) else {"note": found}


def _check(sensitivities: Sensitivities) -> None:
    shape = sensitivities.sensitivity.shape
    if len(shape) != 2 or 0 in shape:
        raise TableFormatError(
            f"sensitivity: expected a matrix of (MoE layers, top-k), found shape {shape}."
        )
    layers, top_k = shape
    model = sensitivities.model
    columns = {"K": top_k, "C": HALF_SLOTS * (top_k - 1) + 1, "E": model and model.num_experts}
    if model is not None and len(model.layer_ids) != layers:
        raise TableFormatError(
            f"layer_ids: expected {layers} layers as in `sensitivity`, found "
            f"{len(model.layer_ids)}."
        )
    for name, matrix in sensitivities.matrices().items():
        expected = (layers, columns[MATRICES[name]] or matrix.shape[-1])
        if matrix.shape != expected:
            raise TableFormatError(f"{name}: expected shape {expected}, found {matrix.shape}.")
        _require_finite(name, matrix, sensitivities.layer_ids)


def _require_finite(name: str, matrix: Array, layer_ids: tuple[int, ...]) -> None:
    bad = np.argwhere(~np.isfinite(matrix))
    if bad.size:
        row, column = bad[0]
        raise TableFormatError(
            f"{name}: expected finite numbers, found {matrix[row, column]} for layer "
            f"{layer_ids[row]}, column {column}. Profile that layer again."
        )
