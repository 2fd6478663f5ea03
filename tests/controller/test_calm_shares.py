"""Which tokens were served in calm steps, as the workers count them, and what follows from it."""

import math
from pathlib import Path

import pytest
from ahead import looking_ahead
from virtual_loop import VirtualController, publish_table

from sglang_alloc.shared_table import (
    SOURCES,
    CalmBudgets,
    CalmTokens,
    SelectorWriter,
    SharedTable,
    WorkerCounters,
)
from sglang_alloc_controller.calm_shares import CalmShares

BUDGETS, CALM = (20, 20), CalmBudgets(48, 41, 9)
# Predicted losses of the test's table: 0.2 at 6 activations, 0 at 48.
LOSS, CALM_DECODE_LOSS = 0.2 * 28 / 42, 0.2 * 7 / 42


def _tokens(calm: int, all_tokens: int) -> CalmTokens:
    return CalmTokens(calm, all_tokens, 2 * calm, 2 * all_tokens)


def _at_calm_budgets(folder: Path, calm: CalmBudgets | None = CALM) -> VirtualController:
    """Return a controller that found budgets below full in its table, and holds them."""
    publish_table(folder / "t.tbl")
    with SharedTable.open(folder / "t.tbl") as table, SelectorWriter.acquire(table) as writer:
        writer.write(*BUDGETS, calm)
    law = {"levels_max": 43, "calm_budgets": calm is not None}  # every budget is a level
    controller, engine = looking_ahead(folder / "t.tbl", law=law)
    # It tells no prompt tokens, and is in the dead band of the law that does not look ahead.
    controller.source, engine.within_ratio = engine, 0.955
    return controller


def _serve(
    controller: VirtualController, ticks: int, *, calm: int, busy: int, source: str = "controller"
) -> None:
    """Let rank 0 serve so many tokens of each phase between two ticks."""
    slot = controller.link.table.worker_slot(0)
    for _ in range(ticks):
        before = controller.link.table.calm_tokens()[0]
        worker = WorkerCounters(
            pid=1,
            acknowledged_generation=controller.link.selector().generation,
            acknowledged_source=SOURCES.index(source),
            prefill_budget=BUDGETS[0],
            decode_budget=BUDGETS[1],
            last_step_ns=controller.clock.now_ns,
        )
        served = (calm, calm + busy) * 2
        counted = CalmTokens(*(old + new for old, new in zip(before, served, strict=True)))
        slot.store(worker, counted)
        controller.tick()
        assert controller.link.selector()[1:] == BUDGETS


def test_the_share_is_that_of_the_last_minute() -> None:
    shares = CalmShares()
    for second in range(0, 100, 10):
        shares.add(second, [_tokens(9 * second, 10 * second)])
    assert shares.ratio("prefill") == pytest.approx(0.9)
    for second in range(100, 180, 10):
        shares.add(second, [_tokens(9 * 90, 10 * second)])
    assert shares.ratio("decode") == 0.0


def test_what_was_counted_before_the_first_look_does_not_count() -> None:
    shares = CalmShares()
    assert shares.ratio("prefill") is None
    shares.add(0.0, [_tokens(0, 1000)])
    assert (shares.ratio("prefill"), shares.was_busy("prefill")) == (None, None)
    shares.add(1.0, [_tokens(10, 1010)])
    assert (shares.ratio("prefill"), shares.was_busy("prefill")) == (1.0, False)


def test_ranks_are_added_and_one_that_starts_anew_counts_from_zero() -> None:
    shares = CalmShares()
    shares.add(0.0, [_tokens(500, 1000), _tokens(0, 0)])
    shares.add(1.0, [_tokens(530, 1040), _tokens(0, 20)])
    assert shares.ratio("decode") == pytest.approx(0.5)
    shares.add(2.0, [_tokens(30, 40), _tokens(0, 20)])
    assert shares.ratio("decode") == pytest.approx(0.6)


def test_between_two_counts_what_was_seen_last_stands_and_for_a_minute_at_most() -> None:
    shares = CalmShares()
    shares.add(0.0, [_tokens(0, 0)])
    shares.add(1.0, [_tokens(5, 6)])
    shares.add(2.0, [_tokens(5, 6)])
    assert shares.was_busy("prefill") is True
    shares.add(3.0, [_tokens(9, 10)])
    assert shares.was_busy("prefill") is False
    shares.add(64.0, [_tokens(9, 10)])
    assert (shares.ratio("prefill"), shares.was_busy("prefill")) == (None, None)


def test_the_expected_loss_is_that_of_both_pairs_by_their_shares(tmp_path: Path) -> None:
    controller = _at_calm_budgets(tmp_path)
    _serve(controller, 20, calm=3, busy=1)
    assert controller.metric("calm_tokens_ratio", phase="decode") == 0.75
    assert controller.metric("predicted_loss_nats", phase="decode") == pytest.approx(LOSS)
    found = controller.metric("calm_predicted_loss_nats", phase="decode")
    assert found == pytest.approx(CALM_DECODE_LOSS)
    found = controller.metric("expected_loss_nats", phase="decode")
    assert found == pytest.approx(0.75 * CALM_DECODE_LOSS + 0.25 * LOSS)
    assert controller.metric("calm_predicted_loss_nats", phase="prefill") == 0.0
    assert controller.metric("expected_loss_nats", phase="prefill") == pytest.approx(0.25 * LOSS)


def test_of_workers_that_do_not_count_the_loss_is_that_of_all_steps_at_the_smaller_budgets(
    tmp_path: Path,
) -> None:
    controller = _at_calm_budgets(tmp_path)
    _serve(controller, 20, calm=0, busy=0)
    assert math.isnan(controller.metric("calm_tokens_ratio", phase="decode"))
    assert controller.metric("expected_loss_nats", phase="decode") == pytest.approx(LOSS)


def test_without_calm_budgets_the_expected_loss_is_the_predicted_one(tmp_path: Path) -> None:
    controller = _at_calm_budgets(tmp_path, calm=None)
    _serve(controller, 20, calm=3, busy=1)
    assert controller.metric("calm_tokens_ratio", phase="decode") == 0.75
    for name in ("predicted", "calm_predicted", "expected"):
        assert controller.metric(f"{name}_loss_nats", phase="decode") == pytest.approx(LOSS)


FULL_IN_CALM_STEPS = CalmBudgets(48, 48, 9)


@pytest.mark.parametrize(
    ("calm", "tokens", "source", "below"),
    [
        (FULL_IN_CALM_STEPS, (5, 0), "controller", False),
        (FULL_IN_CALM_STEPS, (5, 1), "controller", True),
        (FULL_IN_CALM_STEPS, (0, 0), "controller", True),  # workers that count nothing
        (FULL_IN_CALM_STEPS, (5, 0), "override", True),  # budgets that hold in calm steps too
        (FULL_IN_CALM_STEPS, (5, 0), "fallback", True),
        (CALM, (5, 0), "controller", True),  # below full in calm steps, too
        (None, (5, 0), "controller", True),
    ],
)
def test_below_full_is_what_somebody_was_served_at(
    tmp_path: Path,
    calm: CalmBudgets | None,
    tokens: tuple[int, int],
    source: str,
    below: bool,
) -> None:
    controller = _at_calm_budgets(tmp_path, calm)
    _serve(controller, 3, calm=tokens[0], busy=tokens[1], source=source)
    # Before anything was counted, it might have been less than full.
    before = controller.metric("below_full_seconds_total")
    _serve(controller, 20, calm=tokens[0], busy=tokens[1], source=source)
    assert controller.metric("below_full_seconds_total") - before == (10.0 if below else 0.0)
    assert controller.metric("below_full") == float(below)


def test_a_rank_that_has_not_taken_the_calm_budgets_over_is_below_full(tmp_path: Path) -> None:
    controller = _at_calm_budgets(tmp_path, FULL_IN_CALM_STEPS)
    _serve(controller, 20, calm=5, busy=0)
    assert controller.metric("below_full") == 0.0
    slot = controller.link.table.worker_slot(0)
    behind = controller.link.table.worker_counters()[0]._replace(acknowledged_generation=0)
    slot.store(behind, controller.link.table.calm_tokens()[0])
    controller.tick()
    assert controller.metric("below_full") == 1.0
