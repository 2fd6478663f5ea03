"""Where a served step's time goes: traces as torch's profiler writes them, summed by kernel."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from moe_bench import step_figure, step_profile
from moe_bench.step_profile import EXPERTS_KERNEL, ProfileCsv, profile_step, read_profile
from sglang_alloc.server_runs.errors import ServerRunError

LAYERS = 2
STEPS = 3


def _events() -> list[dict[str, Any]]:
    """Three steps of two layers, 100 us apart, beside what is no work of the GPU."""
    events: list[dict[str, Any]] = [{"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1e6}]
    for step in range(STEPS):
        for layer in range(LAYERS):
            start = 100.0 * step + 40.0 * layer
            for place, (name, took) in enumerate(
                [
                    ("void at::native::(anonymous namespace)::topk<float>(int)", 2.0),
                    (EXPERTS_KERNEL, 10.0),
                    (EXPERTS_KERNEL, 6.0),
                ]
            ):
                events.append(
                    {"cat": "kernel", "name": name, "ts": start + 12.0 * place, "dur": took}
                )
    return events


def _write_trace(path: Path, events: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": events}, file)


def test_kernels_are_summed_by_step(tmp_path: Path) -> None:
    _write_trace(tmp_path / "a-DECODE.trace.json.gz", _events())
    profile = read_profile(tmp_path / "a-DECODE.trace.json.gz", LAYERS)
    assert [tuple(kernel) for kernel in profile.kernels] == [
        (EXPERTS_KERNEL, 4.0, 32.0),
        ("at::native::topk", 2.0, 4.0),
    ]
    assert profile.microseconds == pytest.approx((240 + 24 + 6) / STEPS)


def test_a_trace_without_the_experts_is_refused(tmp_path: Path) -> None:
    _write_trace(tmp_path / "a.json.gz", _events()[:2])
    with pytest.raises(ServerRunError, match=EXPERTS_KERNEL):
        read_profile(tmp_path / "a.json.gz", LAYERS)


def test_a_profile_becomes_rows(tmp_path: Path) -> None:
    _write_trace(tmp_path / "a.json.gz", _events())
    profile = read_profile(tmp_path / "a.json.gz", LAYERS)
    steps = ProfileCsv(tmp_path / "steps.csv", {"device": "a GPU"})
    for mode in ("-", "layer"):
        steps.append(("small", 8, mode, "full"), profile)
    with (tmp_path / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kernel"] for row in rows] == ["-", EXPERTS_KERNEL, "at::native::topk"] * 2
    assert rows[0]["us"] == "90.00"
    assert {row["device"] for row in rows} == {"a GPU"}
    assert rows[4]["us"] == "32.00"


class _Client:
    """A server's client: its profiler writes when the steps are decoded, or refuses."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.asked: dict[str, Any] = {}

    def post(self, _path: str, json: dict[str, Any]) -> SimpleNamespace:
        self.asked = json
        return SimpleNamespace(status_code=self.status, text="profiling is in progress")


def _profiled(client: _Client, folder: Path, decode: Any) -> step_profile.StepProfile:
    as_client: httpx2.Client = client  # type: ignore[assignment]
    return profile_step(as_client, LAYERS, decode, folder)


def test_the_trace_of_these_steps_is_read(tmp_path: Path) -> None:
    _write_trace(tmp_path / "earlier-DECODE.trace.json.gz", [])
    client = _Client()
    decoded: list[int] = []

    def decode(tokens: int) -> None:
        decoded.append(tokens)
        _write_trace(tmp_path / "now-DECODE.trace.json.gz", _events())

    assert _profiled(client, tmp_path, decode).kernels[0].name == EXPERTS_KERNEL
    assert client.asked["profile_by_stage"]
    assert decoded[0] > client.asked["num_steps"]


def test_a_profiler_that_does_not_start_or_write_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServerRunError, match="in progress"):
        _profiled(_Client(400), tmp_path, None)
    monkeypatch.setattr(step_profile, "WRITTEN_SECONDS", 0.0)
    with pytest.raises(ServerRunError, match="no trace"):
        _profiled(_Client(), tmp_path, lambda _tokens: None)


def test_a_step_is_drawn_by_what_its_kernels_are_for(tmp_path: Path) -> None:
    def row(mode: str, budget: str, kernel: str, us: float) -> dict[str, str]:
        named = {"shape": "small", "requests": "8", "mode": mode, "budget": budget}
        return named | {"kernel": kernel, "us": str(us), "device": "a GPU"}

    rows = [
        row("layer", "1/2", "-", 99.0),
        row("layer", "1/2", "fused_moe_kernel", 50.0),
        row("layer", "1/2", "_budgeted_slots_kernel", 2.0),
        row("-", "full", "at::native::sbtopk::gatherTopK", 14.0),
        row("-", "full", "nvjet_sm90", 30.0),
    ]
    assert step_figure.bars(rows) == {
        "stock": {"router's choice": 0.014, "the rest": 0.03},
        "layer\n1/2": {"experts": 0.05, "drop and counts": 0.002},
    }
    with (tmp_path / "steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture = tmp_path / "step.png"
    assert step_figure.main([str(tmp_path / "steps.csv"), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "steps.csv").write_text("shape,kernel\n")
    assert step_figure.main([str(tmp_path / "steps.csv"), str(picture)]) == 1
