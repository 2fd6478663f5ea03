"""The loop over a real shared table in virtual time: states, modes, faults and restarts."""

import json
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import structlog
from engine_counters import Engine
from structlog.testing import capture_logs
from time_machine import TimeMachineFixture
from virtual_loop import NS, VirtualController, make_settings, publish_table

from sglang_alloc.errors import ConfigurationError, TableInUseError
from sglang_alloc.shared_table import SelectorWriter, SharedTable, WorkerCounters
from sglang_alloc_controller.quality_bounds import budget_ranges
from sglang_alloc_controller.samples import SLOS, Histogram, Reading

FULL = (48, 48)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    publish_table(tmp_path / "t.tbl")
    return tmp_path / "t.tbl"


def _controller(table: Path, **sections: Any) -> tuple[VirtualController, Engine]:
    controller = VirtualController(make_settings(table, **sections))
    engine = Engine(controller)
    controller.source = engine
    return controller, engine


def _run(controller: VirtualController, seconds: float) -> tuple[int, int]:
    for _ in range(round(seconds / 0.5)):
        line = controller.tick()
    return line.prefill_budget, line.decode_budget


def _degrade(controller: VirtualController, engine: Engine) -> tuple[int, int]:
    engine.within_ratio = 0.5
    _run(controller, 8)
    engine.within_ratio = 1.0
    budgets = _run(controller, 4)
    assert max(budgets) < 48
    return budgets


def _samples_of(controller: VirtualController) -> str:
    lines = controller.metrics.text().decode().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def _ticks(log: Path) -> list[dict[str, Any]]:
    """Return the ticks of a decision log, which begins with a line of its own."""
    first, *ticks = (json.loads(line) for line in log.read_text().splitlines())
    assert first["kind"] == "beginning"
    return ticks


def test_every_tick_beats(table: Path) -> None:
    controller, _ = _controller(table)
    for _ in range(3):
        now_ns = controller.clock.now_ns
        controller.tick()
        assert controller.link.table.heartbeat_ns() == now_ns


def test_a_violation_lowers_the_selector_and_is_reported(table: Path) -> None:
    controller, engine = _controller(table)
    engine.within_ratio = 0.5
    budgets = _run(controller, 8)
    assert max(budgets) < 48
    assert controller.metric("budget_written_activations", phase="decode") == budgets[1]
    assert controller.metric("budget_changes_total", phase="decode", direction="down") >= 1
    assert controller.metric("slo_attainment_ratio", slo="itl") < 0.95
    loss = controller.metric("predicted_loss_nats", phase="decode")
    assert loss == pytest.approx(0.2 * (48 - budgets[1]) / 42, rel=1e-5)


def test_a_server_that_is_not_there_yet_is_stale_and_waited_for(table: Path) -> None:
    controller, engine = _controller(table)
    controller.source = lambda: None
    assert _run(controller, 60) == FULL
    assert controller.state() == "stale"
    assert controller.metric("source_failures_total") == 120
    controller.source = engine
    _run(controller, 2)
    assert controller.state() == "valid"
    assert controller.metric("engine_restarts_total") == 1


def test_a_source_that_dies_leads_to_full_quality_with_a_beating_heart(table: Path) -> None:
    controller, engine = _controller(table, freshness={"ramp_seconds": 10.0})
    budgets = _degrade(controller, engine)
    controller.source = lambda: None
    assert _run(controller, 15) == budgets
    assert controller.state() == "stale"
    assert controller.reason("decode") == "stale_hold"
    assert _run(controller, 25) == FULL
    assert controller.reason("decode") == "stale_ramp"
    beat_ns = controller.link.table.heartbeat_ns()
    assert controller.clock.now_ns - beat_ns == NS // 2


def test_a_reading_that_does_not_get_newer_becomes_stale(table: Path) -> None:
    controller, engine = _controller(table)
    reading = engine()
    controller.source = lambda: reading
    _run(controller, 5.5)
    assert controller.state() == "valid"
    _run(controller, 1)
    assert controller.state() == "stale"
    assert controller.metric("sample_age_seconds") > 5


def test_a_change_against_the_one_before_is_a_reversal(table: Path) -> None:
    controller, engine = _controller(table)
    _degrade(controller, engine)
    assert controller.metric("budget_reversals_total", phase="decode") == 0
    engine.running_requests = 0.0
    assert _run(controller, 20) == FULL
    assert controller.metric("budget_reversals_total", phase="decode") == 1


def test_a_machine_that_slept_for_an_hour_goes_on_without_a_jump(table: Path) -> None:
    controller, engine = _controller(table)
    budgets = _degrade(controller, engine)
    controller.source = lambda: None  # the reading from before the sleep
    controller.clock.move(3600.0)
    assert controller.tick()[1:] == budgets
    assert controller.state() == "stale"
    controller.source = engine
    assert min(controller.tick()[1:]) >= min(budgets)


def test_a_wall_clock_that_jumps_changes_no_decision(
    table: Path, tmp_path: Path, time_machine: TimeMachineFixture
) -> None:
    log = tmp_path / "d.jsonl"
    controller, _ = _controller(table, decision_log={"path": str(log), "every_tick": True})
    for year in (2030, 1999, 2026):
        time_machine.move_to(datetime(year, 1, 1, tzinfo=timezone.utc))
        assert controller.tick()[1:] == FULL
    assert [line["time"][:4] for line in _ticks(log)] == ["2030", "1999", "2026"]
    assert controller.state() == "valid"


def test_an_idle_server_is_served_at_full_quality(table: Path) -> None:
    controller, engine = _controller(table)
    _degrade(controller, engine)
    engine.running_requests = 0.0
    assert _run(controller, 20) == FULL
    assert controller.state() == "idle"


def test_latencies_right_after_an_engine_start_move_nothing(table: Path) -> None:
    controller, engine = _controller(table, freshness={"warmup_seconds": 20.0})
    _run(controller, 5)
    fresh = Engine(controller)
    fresh.within_ratio, fresh.queue_requests = 0.0, 50.0
    controller.source = fresh
    assert _run(controller, 19) == FULL
    assert controller.reason("prefill") == "warmup"
    assert max(_run(controller, 10)) < 48
    assert engine is not fresh


def test_a_controller_that_comes_to_a_running_engine_sees_no_start(table: Path) -> None:
    controller, _ = _controller(table, freshness={"warmup_seconds": 20.0})
    _run(controller, 2)
    assert controller.reason("prefill") == "at_ceiling"


def test_a_replica_that_joins_with_a_long_life_is_a_start_and_no_violation(table: Path) -> None:
    """All that it has answered so far was too late, and under another controller."""
    controller, engine = _controller(table)
    _run(controller, 20)
    late = Histogram(engine.edges, (0.0, 0.0, 50_000.0), 0.0)

    def both() -> Reading:
        one = engine()
        ttft, itl = ({**one.series(slo), "b": late} for slo in SLOS)
        return replace(one, ttft=ttft, itl=itl, engines=2)

    controller.source = both
    assert _run(controller, 60) == FULL
    assert controller.metric("engine_restarts_total") == 1


def test_a_restarted_controller_goes_on_where_the_selector_is(table: Path) -> None:
    controller, engine = _controller(table)
    budgets = _degrade(controller, engine)
    controller.link.close()  # As the kernel does after SIGKILL: the budgets stay.
    controller, _ = _controller(table)
    assert controller.tick()[1:] == budgets
    assert controller.link.table.writer_epoch() == 2


def test_a_selector_outside_the_bounds_is_brought_inside(table: Path) -> None:
    opened = SharedTable.open(table)
    writer = SelectorWriter.acquire(opened)
    writer.write(6, 6)
    writer.close()
    controller, _ = _controller(table, quality={"prefill_floor_budget": 30})
    assert controller.tick()[1:] == (30, 6)


def test_an_override_freezes_the_law_and_names_its_actor(table: Path, tmp_path: Path) -> None:
    log = tmp_path / "d.jsonl"
    controller, engine = _controller(table, decision_log={"path": str(log)})
    budgets = _degrade(controller, engine)
    deadline_ns = controller.clock.now_ns + 10 * NS
    controller.link.table.set_override(10, 11, deadline_ns, "alice")
    engine.within_ratio = 0.0
    assert _run(controller, 10) == budgets
    assert controller.reason("prefill") == "override"
    assert controller.metric("saturation_ratio") == 1.0
    engine.within_ratio = 1.0
    assert _run(controller, 2) == budgets
    assert controller.reason("prefill") != "override"
    actors = [line["actor"] for line in _ticks(log)]
    assert "alice" in actors
    assert actors[-1] == "controller"


def test_shadow_mode_decides_but_leaves_full_quality_in_force(table: Path) -> None:
    opened = SharedTable.open(table)
    writer = SelectorWriter.acquire(opened)
    writer.write(20, 20)
    writer.close()
    controller, engine = _controller(table, mode="shadow")
    engine.within_ratio = 0.0
    assert controller.tick()[1:] == FULL
    assert controller.metric("mode", mode="shadow") == 1
    _run(controller, 15)
    steps = []
    for _ in range(240):
        assert controller.tick()[1:] == FULL
        steps.append(controller.metric("budget_desired_activations", phase="decode"))
    # A quarter of the range at most, from full quality and not from an earlier step.
    assert set(steps) == {48 - round(0.25 * 42)}
    assert controller.metric("infeasible") == 0
    assert controller.reason("decode") == "itl_slo"
    engine.within_ratio = 1.0
    _run(controller, 200)
    assert controller.metric("budget_desired_activations", phase="decode") == 48
    assert controller.reason("decode") == "at_ceiling"


def test_in_shadow_mode_a_violation_is_saturation_because_nothing_is_given_up(
    table: Path,
) -> None:
    controller, engine = _controller(table, mode="shadow")
    _run(controller, 10)
    assert controller.metric("saturation_ratio") == 0.0
    engine.within_ratio = 0.0
    _run(controller, 10)
    assert controller.metric("saturation_ratio") == 1.0


def test_a_step_that_shadow_mode_shows_stands_as_long_as_one_of_the_law(
    table: Path, tmp_path: Path
) -> None:
    """Else each reading of a violation would be a line of the log."""
    log = tmp_path / "d.jsonl"
    controller, engine = _controller(table, mode="shadow", decision_log={"path": str(log)})
    for number in range(60):
        engine.within_ratio = (0.0, 0.3, 0.6)[number % 3]
        _run(controller, 1)
    assert len(_ticks(log)) <= 60 / 3 + 2


@pytest.mark.parametrize("kill_cause", [None, "file x"])
def test_budgets_that_a_person_set_are_saturated_while_the_readings_violate(
    table: Path, kill_cause: str | None
) -> None:
    fixed = {"prefill_budget": 27, "decode_budget": 48}
    settings = make_settings(table, mode="fixed", fixed=fixed)
    controller = VirtualController(settings, kill_cause=lambda: kill_cause)
    engine = Engine(controller)
    controller.source = engine
    deficit = 0.0 if kill_cause else 0.4
    _run(controller, 10)
    assert controller.metric("saturation_ratio") == pytest.approx(deficit)
    engine.within_ratio = 0.0
    _run(controller, 10)
    assert controller.metric("saturation_ratio") == 1.0
    engine.within_ratio = 1.0
    _run(controller, 200)
    assert controller.metric("saturation_ratio") == pytest.approx(deficit)


@pytest.mark.parametrize("mode", ["control", "shadow", "fixed"])
def test_of_a_stale_input_no_saturation_is_told(table: Path, tmp_path: Path, mode: str) -> None:
    """An autoscaler takes a number for one, and may take NaN for 0 and scale in."""
    log, fixed = tmp_path / "d.jsonl", {"prefill_budget": 30, "decode_budget": 12}
    controller, _ = _controller(table, mode=mode, fixed=fixed, decision_log={"path": str(log)})
    _run(controller, 2)
    assert "controller_saturation_ratio " in _samples_of(controller)
    controller.source = lambda: None
    _run(controller, 10)
    assert "controller_saturation_ratio " not in _samples_of(controller)
    assert _ticks(log)[-1]["saturation_ratio"] is None


def test_fixed_mode_writes_its_budgets_whatever_happens(table: Path) -> None:
    fixed = {"prefill_budget": 30, "decode_budget": 12}
    controller, engine = _controller(table, mode="fixed", fixed=fixed)
    engine.within_ratio = 0.0
    assert _run(controller, 20) == (30, 12)
    assert controller.reason("decode") == "fixed"


def test_the_loss_bound_is_a_floor_for_each_phase(tmp_path: Path) -> None:
    import numpy as np

    budgets = np.arange(6, 49)
    quotas = ((budgets[:, None] + np.arange(6)[None]) // 6).astype(np.int16)
    cheap = np.linspace(0.1, 0.0, 43).astype(np.float32)
    publish_table(tmp_path / "t.tbl", prefill_quotas=quotas, prefill_predicted_loss=cheap)
    settings = make_settings(tmp_path / "t.tbl", quality={"max_predicted_loss": 0.05})
    ranges = budget_ranges(SharedTable.open(tmp_path / "t.tbl"), settings)
    # 0.05 of 0.1 is half the 42 activations of range, of 0.2 a quarter.
    assert (ranges["prefill"].floor, ranges["decode"].floor) == (27, 38)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"quality": {"decode_floor_budget": 5}}, "quality.decode_floor_budget is 5"),
        ({"quality": {"prefill_ceiling_budget": 49}}, "budgets from 6 to 48"),
        (
            {"quality": {"max_predicted_loss": 0.0, "decode_ceiling_budget": 40}},
            "no budget is left",
        ),
        (
            {"mode": "fixed", "fixed": {"prefill_budget": 48, "decode_budget": 4}},
            "fixed.decode_budget is 4",
        ),
    ],
)
def test_settings_that_do_not_fit_the_table_are_refused(
    table: Path, sections: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        budget_ranges(SharedTable.open(table), make_settings(table, **sections))
    assert sentence in str(refused.value)


def test_a_replaced_table_is_followed(table: Path) -> None:
    controller, engine = _controller(table)
    _degrade(controller, engine)
    publish_table(table, top_k=4)
    controller.tick()
    new = SharedTable.open(table)
    assert controller.link.table.publication_id == new.publication_id
    assert new.heartbeat_ns() > 0
    assert new.selector()[1:] == (24, 24)
    _degrade(controller, engine)
    assert max(new.selector()[1:]) < 24


def test_a_deleted_table_stays_in_use_because_the_server_still_reads_it(table: Path) -> None:
    controller, engine = _controller(table)
    opened = SharedTable.open(table)
    table.unlink()
    budgets = _degrade(controller, engine)
    assert opened.selector()[1:] == budgets
    publish_table(table)
    _run(controller, 1)
    assert controller.link.table.publication_id != opened.publication_id


def test_a_table_replaced_by_something_else_is_not_followed(table: Path) -> None:
    controller, _ = _controller(table)
    first = controller.link.table.publication_id
    other = table.with_name("other")
    other.write_bytes(b"not a table" * 1000)
    other.replace(table)
    assert _run(controller, 2) == FULL
    assert controller.link.table.publication_id == first
    assert controller.metric("tick_errors_total") == 0


def test_a_second_writer_ends_the_loop(table: Path) -> None:
    controller, _ = _controller(table)
    table.with_name("t.tbl.lock").unlink()
    SelectorWriter.acquire(SharedTable.open(table))
    with pytest.raises(TableInUseError, match="has taken over"):
        controller.run_for(5)


def test_a_failing_tick_is_counted_and_the_next_one_works(table: Path) -> None:
    controller, engine = _controller(table)
    calls = []

    def sometimes() -> Reading:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return engine()

    controller.source = sometimes
    controller.run_for(3)
    assert controller.metric("tick_errors_total") == 1
    assert controller.metric("ticks_total") == len(calls) - 1 >= 4


def test_an_slo_that_is_no_bucket_edge_is_not_guessed_at(table: Path) -> None:
    controller, engine = _controller(table)
    engine.edges, engine.within_ratio = (0.04, 0.9, float("inf")), 0.0
    assert _run(controller, 30) == FULL
    assert controller.metric("slo_attainment_ratio", slo="ttft") != 0.0


def test_a_priority_that_the_server_does_not_show_is_logged_once(table: Path) -> None:
    controller, _ = _controller(table, source={"priorities": ["0"]})
    structlog.reset_defaults()  # the fixture that silences logs puts them back afterwards
    with capture_logs() as logs:
        _run(controller, 300)
    events = [line["event"] for line in logs]
    assert events.count("priority_not_seen") == 1


def test_the_slowest_worker_is_reported(table: Path) -> None:
    controller, _ = _controller(table)
    for rank, generation in enumerate((7, 5)):
        slot = controller.link.table.worker_slot(rank)
        slot.store(
            WorkerCounters(
                pid=1,
                rank=rank,
                acknowledged_generation=generation,
                prefill_budget=40 - rank,
                decode_budget=30 - rank,
            )
        )
    controller.tick()
    assert controller.metric("budget_acknowledged_activations", phase="prefill") == 39


def test_leaving_writes_full_quality_and_lets_another_in(table: Path) -> None:
    controller, engine = _controller(table)
    _degrade(controller, engine)
    controller.link.leave_at_full_quality()
    opened = SharedTable.open(table)
    assert opened.selector()[1:] == FULL
    SelectorWriter.acquire(opened).close()


def test_a_line_of_the_decision_log_tells_the_whole_story(table: Path, tmp_path: Path) -> None:
    log = tmp_path / "d.jsonl"
    controller, engine = _controller(table, decision_log={"path": str(log)})
    budgets = _degrade(controller, engine)
    lines = _ticks(log)
    changed = [line for line in lines if line["from"] != line["to"]]
    assert changed[-1]["to"] == {"prefill": budgets[0], "decode": budgets[1]}
    assert changed[-1]["reasons"]["decode"] == "itl_slo"
    assert changed[-1]["samples"]["itl"]["within_ratio"] < 0.95
    assert len(lines) < 8


def test_with_every_tick_each_tick_is_a_line(table: Path, tmp_path: Path) -> None:
    log = tmp_path / "d.jsonl"
    controller, _ = _controller(table, decision_log={"path": str(log), "every_tick": True})
    _run(controller, 5)
    assert len(_ticks(log)) == 10
