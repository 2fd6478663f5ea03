"""The loop and the budgets of calm steps: who writes them, who ends them, and what is told."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ahead import looking_ahead, run
from virtual_loop import NS, VirtualController, make_settings, publish_table

from sglang_alloc.shared_table import CalmBudgets, Fallback, SelectorWriter, SharedTable
from sglang_alloc.shared_table_words import RUNNING_ANY
from sglang_alloc_controller.config_follower import ReloadOutcome
from sglang_alloc_controller.control_core import ControlCore
from sglang_alloc_controller.law_state import Decision, Reason
from sglang_alloc_controller.quality_bounds import budget_ranges
from sglang_alloc_controller.settings import Settings

FULL = (48, 48)
PHASES = ("prefill", "decode")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    publish_table(tmp_path / "t.tbl")
    return tmp_path / "t.tbl"


def _leave(table: Path, budgets: tuple[int, int], calm: CalmBudgets | None) -> int:
    """Leave these budgets in the table, as a controller that was killed does."""
    with SharedTable.open(table) as opened, SelectorWriter.acquire(opened) as writer:
        return writer.write(*budgets, calm)


def _selector(controller: VirtualController) -> tuple[int, int]:
    selector = controller.link.selector()
    return selector.prefill_budget, selector.decode_budget


def _calm(controller: VirtualController) -> CalmBudgets:
    calm = controller.link.calm_budgets()
    assert calm is not None
    return calm


def _by_phase(controller: VirtualController, name: str) -> tuple[float, float]:
    prefill, decode = (controller.metric(name, phase=phase) for phase in PHASES)
    return prefill, decode


def test_what_the_law_asks_for_in_calm_steps_is_written_beside_the_selector(
    table: Path, tmp_path: Path
) -> None:
    log = tmp_path / "d.jsonl"
    controller, _ = looking_ahead(table, decision_log={"path": str(log)})
    run(controller, 60)
    calm, selector = _calm(controller), _selector(controller)
    assert min(selector) < 48
    assert sum(calm[:2]) > sum(selector)
    # 0.9375 of the 16 requests that were seen running at most.
    assert calm.running_requests == 15
    assert _by_phase(controller, "calm_budget_desired_activations") == calm[:2]
    assert _by_phase(controller, "calm_budget_written_activations") == calm[:2]
    assert controller.metric("calm_running_requests") == 15
    last = json.loads(log.read_text().splitlines()[-1])
    pair = {"prefill": calm.prefill_budget, "decode": calm.decode_budget}
    assert last["calm"] == {"desired": pair, "written": pair, "running_requests": 15}
    assert last["to"] == {"prefill": selector[0], "decode": selector[1]}


def test_without_calm_budgets_in_the_settings_there_are_none(table: Path) -> None:
    controller, _ = looking_ahead(table, law={"calm_budgets": False})
    run(controller, 60)
    assert min(_selector(controller)) < 48
    assert controller.link.calm_budgets() is None
    written = _by_phase(controller, "budget_written_activations")
    assert _by_phase(controller, "calm_budget_written_activations") == written
    assert math.isnan(controller.metric("calm_running_requests"))


def test_switching_them_off_ends_them_at_the_next_tick(table: Path) -> None:
    found: list[tuple[ReloadOutcome, Settings]] = []

    def follow(accept: Any) -> tuple[ReloadOutcome, Settings] | None:
        if not found:
            return None
        accept(found[0][1])
        return found.pop()

    controller, _ = looking_ahead(table, {"follow_config": follow})
    run(controller, 60)
    selector = _selector(controller)
    _calm(controller)
    law = controller.settings.law.model_copy(update={"calm_budgets": False})
    settings = controller.settings.model_copy(update={"law": law})
    found.append((ReloadOutcome(True, "changed"), settings))
    controller.tick()
    assert controller.link.calm_budgets() is None
    assert _selector(controller) == selector


def test_the_kill_switch_ends_them_with_everything_else(table: Path) -> None:
    causes: list[str | None] = [None]
    controller, _ = looking_ahead(table, {"kill_cause": lambda: causes[0]})
    run(controller, 60)
    _calm(controller)
    causes[0] = "file x"
    controller.tick()
    assert _selector(controller) == FULL
    assert controller.link.calm_budgets() is None
    assert _by_phase(controller, "calm_budget_desired_activations") == FULL


def test_an_override_holds_in_calm_steps_too_and_leaves_both_pairs_for_later(table: Path) -> None:
    controller, _ = looking_ahead(table)
    run(controller, 60)
    calm, selector = _calm(controller), _selector(controller)
    deadline_ns = controller.clock.now_ns + 10 * NS
    controller.link.table.set_override(10, 11, deadline_ns, "alice")
    run(controller, 5)
    selection = controller.link.table.selection(controller.clock.now_ns, NS, Fallback("full"))
    assert (selection.source, selection.calm) == ("override", None)
    assert (_selector(controller), _calm(controller)) == (selector, calm)
    assert _by_phase(controller, "calm_budget_desired_activations") == calm[:2]
    run(controller, 6)
    selection = controller.link.table.selection(controller.clock.now_ns, NS, Fallback("full"))
    assert (selection.source, selection.calm) == ("controller", calm)


def test_in_shadow_mode_they_are_told_and_never_written(table: Path) -> None:
    _leave(table, (20, 20), CalmBudgets(40, 40, 9))
    controller, _ = looking_ahead(table, mode="shadow")
    told = set()
    for _ in range(120):
        assert controller.tick()[1:] == FULL
        assert controller.link.calm_budgets() is None
        desired = _by_phase(controller, "budget_desired_activations")
        calm = _by_phase(controller, "calm_budget_desired_activations")
        assert all(one >= other for one, other in zip(calm, desired, strict=True))
        told.add(calm != desired)
    assert True in told
    assert _by_phase(controller, "calm_budget_written_activations") == FULL


def test_fixed_budgets_hold_in_calm_steps_too(table: Path) -> None:
    _leave(table, (20, 20), CalmBudgets(40, 40, 9))
    fixed = {"prefill_budget": 30, "decode_budget": 12}
    controller, _ = looking_ahead(table, mode="fixed", fixed=fixed)
    assert controller.tick()[1:] == (30, 12)
    assert controller.link.calm_budgets() is None


def test_without_fresh_input_they_go_up_with_the_others_until_all_are_full(table: Path) -> None:
    controller, _ = looking_ahead(table)
    run(controller, 60)
    calm, selector = _calm(controller), _selector(controller)
    controller.source = lambda: None
    run(controller, 15)
    assert (_selector(controller), controller.link.calm_budgets()) == (selector, calm)
    run(controller, 200)
    assert _selector(controller) == FULL
    assert controller.link.calm_budgets() is None


def test_a_controller_that_stops_leaves_full_quality_alone(table: Path) -> None:
    controller, _ = looking_ahead(table)
    run(controller, 60)
    controller.link.leave_at_full_quality()
    opened = SharedTable.open(table)
    assert opened.selector()[1:] == FULL
    assert opened.calm_budgets() is None


def test_a_restarted_controller_goes_on_at_both_pairs_without_a_write(table: Path) -> None:
    first, _ = looking_ahead(table)
    run(first, 60)
    calm, selector = _calm(first), _selector(first)
    generation = first.link.selector().generation
    first.link.close()  # As the kernel does after SIGKILL: the budgets stay.
    controller, _ = looking_ahead(table)
    run(controller, 4)
    assert (_selector(controller), _calm(controller)) == (selector, calm)
    assert controller.link.selector().generation == generation


def test_a_controller_that_finds_one_pair_for_all_steps_goes_on_at_it(table: Path) -> None:
    """Under a load that nothing carries, which is no time to give quality back."""
    generation = _leave(table, (6, 6), None)
    controller, _ = looking_ahead(table)
    controller.source = lambda: None
    run(controller, 4)
    assert (_selector(controller), controller.link.calm_budgets()) == ((6, 6), None)
    assert controller.link.selector().generation == generation


def test_budgets_that_latencies_lower_take_those_of_calm_steps_with_them(table: Path) -> None:
    """A server that tells no prompt tokens: nothing is looked ahead by, whatever was before."""
    _leave(table, (20, 20), CalmBudgets(48, 48, 9))
    controller, engine = looking_ahead(table)
    controller.source = engine
    run(controller, 2)
    assert (_selector(controller), _calm(controller)) == ((21, 21), CalmBudgets(48, 48, 9))
    engine.within_ratio = 0.5
    run(controller, 30)
    assert _selector(controller) == (6, 6)
    # 0.7 of what the floor gives up, at the nearest level.
    assert _calm(controller) == CalmBudgets(37, 37, RUNNING_ANY)


def test_calm_budgets_outside_the_bounds_are_brought_inside(table: Path) -> None:
    _leave(table, (6, 20), CalmBudgets(48, 48, 9))
    controller, _ = looking_ahead(table, quality={"decode_ceiling_budget": 40})
    controller.tick()
    assert _calm(controller).decode_budget == 40
    assert _calm(controller).running_requests == 9


def test_without_a_cost_model_calm_steps_keep_a_share_of_what_the_budgets_give_up(
    table: Path,
) -> None:
    """Whatever pair was found: 0.7 of 28, in steps that leave no request waiting."""
    _leave(table, (20, 20), CalmBudgets(30, 30, 9))
    controller = VirtualController(make_settings(table))
    assert controller.tick()[1:] == (20, 20)
    assert controller.link.calm_budgets() == CalmBudgets(40, 40, RUNNING_ANY)


def test_without_a_cost_model_and_calm_budgets_a_pair_that_is_found_ends(table: Path) -> None:
    _leave(table, (20, 20), CalmBudgets(40, 40, 9))
    controller = VirtualController(make_settings(table, law={"calm_budgets": False}))
    assert controller.tick()[1:] == (20, 20)
    assert controller.link.calm_budgets() is None


@pytest.mark.parametrize("calm", [None, CalmBudgets(30, 20, 9), CalmBudgets(30, 30, 8)])
def test_only_what_differs_is_written(table: Path, calm: CalmBudgets | None) -> None:
    controller = VirtualController(make_settings(table))
    there = CalmBudgets(30, 30, 9)
    assert controller.link.write(20, 20, there)
    assert not controller.link.write(20, 20, there)
    assert controller.link.write(20, 20, calm)
    assert controller.link.calm_budgets() == calm


def test_a_number_of_running_requests_beyond_the_tables_is_the_largest(table: Path) -> None:
    controller, _ = looking_ahead(table)
    settings = controller.settings
    core = ControlCore(
        settings, budget_ranges(controller.link.table, settings), {"prefill": 48, "decode": 48}, 0.0
    )
    decision = Decision({}, dict.fromkeys(("prefill", "decode"), Reason.HOLD), {}, 0.0)
    for number, written in ((10**9, RUNNING_ANY), (0, 1)):
        asked = decision._replace(
            calm_positions={"prefill": 1.0, "decode": 1.0}, calm_running_requests=number
        )
        assert core.calm_budgets(asked) == CalmBudgets(48, 48, written)


def test_changes_of_either_pair_are_counted_apart(table: Path) -> None:
    controller, engine = looking_ahead(table)
    run(controller, 60)
    calm, selector = _calm(controller), _selector(controller)
    assert selector[0] < calm[0]
    down = {"phase": "prefill", "direction": "down"}
    assert controller.metric("budget_changes_total", **down) >= 1
    lowered = calm[0] < 48
    assert (controller.metric("calm_budget_changes_total", **down) >= 1) is lowered
    engine.running_requests = 0.0  # idle: back to full, which turns round what was lowered
    run(controller, 60)
    assert controller.metric("budget_reversals_total", phase="prefill") == 1
    assert controller.metric("calm_budget_reversals_total", phase="prefill") == float(lowered)
