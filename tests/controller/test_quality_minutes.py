"""Minutes below full quality: what counts, the rolling window, and what an idle server is."""

import math
from pathlib import Path

import pytest
from engine_counters import Engine
from virtual_loop import NS, VirtualController, make_settings, publish_table

from sglang_alloc.shared_table import WorkerCounters
from sglang_alloc_controller.quality_minutes import QualityMinutes

HOUR = 3600.0


# The largest pid of Linux, which is the first that no process has.
NO_PROCESS = 4_194_304


def _step(controller: VirtualController, pid: int, age_seconds: float = 0.0) -> None:
    """Let rank 0 have stepped so long ago, at budgets of which one is below full."""
    last_step_ns = controller.clock.now_ns - round(age_seconds * NS)
    worker = WorkerCounters(pid=pid, prefill_budget=40, decode_budget=48, last_step_ns=last_step_ns)
    controller.link.table.worker_slot(0).store(worker)


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
    _step(controller, pid=1, age_seconds=1000.0)
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


def test_the_slot_of_a_server_that_is_gone_counts_no_more(tmp_path: Path) -> None:
    publish_table(tmp_path / "t.tbl")
    controller = VirtualController(make_settings(tmp_path / "t.tbl"))
    engine = Engine(controller)
    controller.source = engine
    _step(controller, NO_PROCESS)
    controller.tick()
    assert controller.metric("budget_acknowledged_activations", phase="prefill") == 40
    for _ in range(7200):
        controller.tick()
    assert math.isnan(controller.metric("budget_acknowledged_activations", phase="prefill"))
    # The first tick has no time behind it.
    assert controller.metric("below_full_seconds_total") == pytest.approx(9.5)


@pytest.mark.parametrize(("steps", "minutes"), [(True, 1.0), (False, 9.5 / 60)])
def test_without_readings_a_rank_counts_while_it_steps(
    tmp_path: Path, steps: bool, minutes: float
) -> None:
    publish_table(tmp_path / "t.tbl")
    controller = VirtualController(make_settings(tmp_path / "t.tbl"))
    _step(controller, pid=1)
    for _ in range(121):
        controller.tick()
        if steps:
            _step(controller, pid=1)
    assert controller.state() == "stale"
    assert controller.metric("budget_acknowledged_activations", phase="prefill") == 40
    assert controller.metric("below_full_minutes") == pytest.approx(minutes)
