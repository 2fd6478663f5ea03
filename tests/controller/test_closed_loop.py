"""The loop around a server whose latency falls with the budget: it settles, recovers, returns."""

from pathlib import Path
from typing import Any

import pytest
from plant import Plant
from virtual_loop import VirtualController, make_settings, publish_table

CALM, BURST = 1.0, 6.0
SLO = {"ttft_seconds": 1.0, "itl_seconds": 0.1}


class ClosedLoop:
    """A plant read once a second and obeying the selector at every tick."""

    def __init__(self, folder: Path, gain: float = 1.0, top_k: int = 8, **plant: Any) -> None:
        publish_table(folder / "t.tbl", top_k=top_k)
        self.controller = VirtualController(make_settings(folder / "t.tbl", slo=SLO))
        self.start_seconds = self.controller.clock.now_seconds
        self.full = 6 * top_k
        self.plant = Plant(self.full, gain=gain, now_seconds=self.start_seconds, **plant)
        self._reading = self.plant.reading()
        self.controller.source = lambda: self._reading

    def run(self, seconds: float, requests_per_second: float) -> None:
        """Let virtual time pass under this load."""
        clock = self.controller.clock
        end_seconds = clock.now_seconds + seconds
        while clock.now_seconds < end_seconds:
            self.plant.advance(clock.now_seconds, requests_per_second)
            if clock.now_seconds - self._reading.taken_at_seconds >= 0.99:
                self._reading = self.plant.reading()
            line = self.controller.tick()
            self.plant.prefill_budget, self.plant.decode_budget = line[1:]

    def attainment(self, last_seconds: float) -> float:
        """Share of the last requests whose first token came within a second."""
        since = self.plant.now_seconds - last_seconds
        late = [seconds for at, seconds in self.plant.ttft_log if at >= since]
        return sum(one <= 1.0 for one in late) / len(late)

    def spread(self, last_seconds: float) -> float:
        """Largest move of either budget in the last seconds, as a share of its range."""
        since = self.controller.clock.now_seconds - last_seconds
        lines = [line for line in self.controller.lines if line.now_seconds >= since]
        columns = list(zip(*(line[1:] for line in lines), strict=True))
        return max(max(column) - min(column) for column in columns) / (self.full - 6)


def test_a_calm_server_keeps_full_quality(tmp_path: Path) -> None:
    loop = ClosedLoop(tmp_path)
    loop.run(600, CALM)
    assert loop.controller.changes() <= 2
    assert loop.controller.lines[-1][1:] == (loop.full, loop.full)
    assert loop.attainment(600) == 1.0


@pytest.mark.parametrize(("gain", "seed"), [(0.5, 0), (1.0, 1), (1.5, 0)])
def test_under_constant_load_the_budgets_settle(tmp_path: Path, gain: float, seed: int) -> None:
    loop = ClosedLoop(tmp_path, gain, seed=seed)
    loop.run(1800, 5.5)
    assert loop.controller.changes(loop.start_seconds + 1200) <= 12
    assert loop.spread(600) <= 0.5
    assert loop.attainment(600) >= 0.95


def test_a_step_of_load_is_answered_and_attainment_comes_back(tmp_path: Path) -> None:
    loop = ClosedLoop(tmp_path)
    loop.run(120, CALM)
    loop.run(30, 7.0)
    assert min(loop.controller.lines[-1][1:]) <= loop.full / 2
    loop.run(120, 7.0)
    assert loop.attainment(90) >= 0.95


def test_at_full_budget_the_same_load_is_not_kept(tmp_path: Path) -> None:
    plant = Plant(48, now_seconds=1000.0)
    plant.advance(1300.0, 7.0)
    late = [seconds for _, seconds in plant.ttft_log[-300:]]
    assert sum(one <= 1.0 for one in late) / len(late) < 0.5


@pytest.mark.parametrize("top_k", [2, 8, 250])
def test_after_the_load_the_budget_returns_to_full(tmp_path: Path, top_k: int) -> None:
    loop = ClosedLoop(tmp_path, top_k=top_k)
    loop.run(60, CALM)
    loop.run(180, BURST)
    assert min(loop.controller.lines[-1][1:]) < loop.full
    loop.run(300, CALM)
    assert min(loop.controller.lines[-1][1:]) >= 0.9 * loop.full


def test_when_the_server_becomes_idle_the_budget_is_full_within_seconds(tmp_path: Path) -> None:
    loop = ClosedLoop(tmp_path)
    loop.run(60, CALM)
    loop.run(120, BURST)
    loop.run(30, 0.0)
    assert loop.controller.lines[-1][1:] == (loop.full, loop.full)
    assert loop.controller.state() == "idle"


def test_a_load_no_budget_can_serve_is_reported_as_infeasible(tmp_path: Path) -> None:
    loop = ClosedLoop(tmp_path, gain=0.3)
    loop.run(180, 30.0)
    assert loop.controller.lines[-1][1:] == (6, 6)
    assert loop.controller.metric("infeasible") == 1.0
    assert loop.controller.metric("saturation_ratio") == 1.0


def test_an_engine_restart_under_load_is_no_violation(tmp_path: Path) -> None:
    publish_table(tmp_path / "t.tbl")
    loop = ClosedLoop(tmp_path)
    loop.run(60, 2.0)
    loop.plant.restart()
    loop.run(30, 2.0)
    assert loop.controller.metric("engine_restarts_total") == 1.0
    assert loop.controller.lines[-1][1:] == (loop.full, loop.full)
