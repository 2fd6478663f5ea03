"""Minutes below full quality: what counts, the rolling window, and what an idle server is."""

from pathlib import Path

import pytest
from engine_counters import Engine
from virtual_loop import VirtualController, make_settings, publish_table

from sglang_alloc.shared_table import WorkerCounters
from sglang_alloc_controller.quality_minutes import QualityMinutes

HOUR = 3600.0


def _run(minutes: QualityMinutes, start: float, seconds: float, *, below: bool) -> float:
    for number in range(int(seconds) + 1):
        minutes.add(start + number, below_full=below, window_seconds=HOUR)
    return start + seconds


def test_only_time_below_full_quality_counts() -> None:
    minutes = QualityMinutes()
    now = _run(minutes, 1000.0, 120, below=True)
    now = _run(minutes, now, 600, below=False)
    _run(minutes, now, 60, below=True)
    assert minutes.minutes() == pytest.approx(3.0)
    assert minutes.total_seconds == pytest.approx(180.0)


def test_what_left_the_window_is_in_the_total_only() -> None:
    minutes = QualityMinutes()
    now = _run(minutes, 1000.0, 300, below=True)
    _run(minutes, now, HOUR + 60, below=False)
    assert minutes.minutes() == 0.0
    assert minutes.total_seconds == pytest.approx(300.0)


def test_a_pause_of_the_process_is_no_time_in_service() -> None:
    minutes = QualityMinutes()
    minutes.add(0.0, below_full=True, window_seconds=HOUR)
    minutes.add(3000.0, below_full=True, window_seconds=HOUR)
    minutes.add(2000.0, below_full=True, window_seconds=HOUR)  # a clock that jumped back
    assert minutes.total_seconds == 0.0


def test_a_rank_below_its_ceiling_counts_while_the_server_has_work(tmp_path: Path) -> None:
    publish_table(tmp_path / "t.tbl")
    quality = {"below_full_minutes": 5.0}
    controller = VirtualController(make_settings(tmp_path / "t.tbl", quality=quality))
    engine = Engine(controller)
    controller.source = engine
    slot = controller.link.table.worker_slot(0)
    zeros = WorkerCounters(*[0] * len(WorkerCounters._fields))
    slot.store(zeros._replace(pid=1, prefill_budget=40, decode_budget=48))
    for _ in range(21):
        controller.tick()
    assert controller.metric("below_full_seconds_total") == pytest.approx(10.0)
    assert controller.metric("below_full_minutes") == pytest.approx(1 / 6)
    assert controller.metric("below_full_agreed_minutes") == 5.0
    engine.running_requests = 0.0
    for _ in range(40):
        controller.tick()
    assert controller.state() == "idle"
    assert controller.metric("below_full_seconds_total") < 16.0
