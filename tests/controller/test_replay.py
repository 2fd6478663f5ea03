"""Replay: a recorded log gives the same decisions again, and other settings give others."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ahead import looking_ahead, run
from engine_counters import Engine
from virtual_loop import NS, VirtualController, make_settings, publish_table

from sglang_alloc_controller.cli_replay import replay_files
from sglang_alloc_controller.reading_json import reading_from_json, reading_to_json
from sglang_alloc_controller.replay import ReplayedTick, ReplayError, replay
from sglang_alloc_controller.samples import RankTime
from sglang_alloc_controller.settings import parse_settings


def _record(tmp_path: Path, mode: str = "control", **log: Any) -> Path:
    """Record an overload, an outage, an override, a kill and a recovery, tick by tick."""
    path, killed = tmp_path / "d.jsonl", [None]
    publish_table(tmp_path / "t.tbl")
    chosen = {"path": str(path), "every_tick": True, **log}
    settings = make_settings(tmp_path / "t.tbl", mode=mode, decision_log=chosen)
    controller = VirtualController(settings, kill_cause=lambda: killed[0])
    engine = Engine(controller)
    controller.source = engine
    for ratio, outage, kill in (
        (1.0, False, None),
        (0.4, False, None),
        (0.4, True, None),
        (0.9, False, None),
        (1.0, False, "file x"),
        (0.5, False, None),
    ):
        engine.within_ratio, killed[0] = ratio, kill
        controller.source = (lambda: None) if outage else engine
        for _ in range(40):
            controller.tick()
        if ratio == 0.9:
            deadline_ns = controller.clock.now_ns + 5 * NS
            controller.link.table.set_override(10, 11, deadline_ns, "alice")
    controller.link.leave_at_full_quality()
    return path


def _records(*paths: Path) -> list[dict[str, Any]]:
    return [record for path in paths for record in _records_of(path.read_text())]


def _records_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _replayed(*paths: Path) -> list[ReplayedTick]:
    return list(replay(_records(*paths)))


@pytest.mark.parametrize(("mode", "budgets"), [("control", 4), ("shadow", 2)])
def test_a_recorded_log_gives_the_same_decisions_and_reasons_again(
    tmp_path: Path, mode: str, budgets: int
) -> None:
    ticks = _replayed(_record(tmp_path, mode))
    assert len(ticks) == 240
    assert len({tuple(tick.recorded.values()) for tick in ticks}) >= budgets
    for tick in ticks:
        assert tick.replayed == tick.recorded
        assert tick.replayed_reasons == tick.recorded_reasons


def _record_calm(tmp_path: Path) -> Path:
    """Record calm budgets, an override beside them, a restart that finds them, and a kill."""
    path, killed = tmp_path / "d.jsonl", [None]
    publish_table(tmp_path / "t.tbl")
    log = {"path": str(path), "every_tick": True}
    for kill in (None, "file x"):
        killed[0] = None
        controller, _ = looking_ahead(
            tmp_path / "t.tbl", {"kill_cause": lambda: killed[0]}, decision_log=log
        )
        run(controller, 50)
        deadline_ns = controller.clock.now_ns + 3 * NS
        controller.link.table.set_override(10, 11, deadline_ns, "alice")
        run(controller, 5)
        killed[0] = kill
        run(controller, 5)
        controller.link.close()
    return path


def test_calm_budgets_replay_as_they_were_asked_for(tmp_path: Path) -> None:
    ticks = _replayed(_record_calm(tmp_path))
    assert len(ticks) == 240
    assert len({tick.recorded_calm for tick in ticks}) >= 2
    assert [tick.replayed_calm for tick in ticks] == [tick.recorded_calm for tick in ticks]
    assert not any(tick.budgets_differ for tick in ticks)
    # Under the override they stay asked for, under the kill switch they do not.
    assert ticks[105].recorded_calm == ticks[95].recorded_calm is not None
    assert ticks[-1].recorded_calm is None


def test_a_log_of_a_controller_without_calm_budgets_replays_and_shows_where_there_would_be_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _record_calm(tmp_path)
    old = [{key: one for key, one in line.items() if key != "calm"} for line in _records(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    ticks = _replayed(path)
    asked = [tick for tick in ticks if tick.replayed_calm is not None]
    assert 0 < len(asked) < len(ticks)
    assert [tick.budgets_differ for tick in ticks] == [tick in asked for tick in ticks]
    assert replay_files([path], None, tmp_path / "out.csv")
    assert re.search(r"calm none -> \d+/\d+ below 15 running", capsys.readouterr().out)
    header, *rows = csv.reader((tmp_path / "out.csv").read_text().splitlines())
    assert header[-4:] == [
        f"{phase}_{column}_calm"
        for phase in ("prefill", "decode")
        for column in ("recorded", "replayed")
    ]
    assert any(row[-4] != row[-3] for row in rows)


def test_files_that_rotated_replay_as_one_run(tmp_path: Path) -> None:
    path = _record(tmp_path, max_bytes=60_000, keep_files=20)
    older = [one for one in tmp_path.iterdir() if one.name.startswith("d.jsonl.")]
    assert len(older) > 2
    in_order = sorted(older, key=lambda one: -int(one.suffix[1:]))
    ticks = _replayed(*in_order, path)
    assert len(ticks) == 240
    assert not any(tick.budgets_differ for tick in ticks)


def test_the_newest_file_alone_can_be_replayed_too(tmp_path: Path) -> None:
    path = _record(tmp_path, max_bytes=60_000, keep_files=20)
    assert 0 < len(_replayed(path)) < 240


def test_a_log_of_two_lives_of_the_controller_replays_each_from_its_own_start(
    tmp_path: Path,
) -> None:
    """The second one began after the machine did, whose clock counts from there."""
    path = _record(tmp_path)
    settings = parse_settings(_records(path)[0]["settings"])
    controller = VirtualController(settings)
    engine = Engine(controller)
    controller.source = engine
    for ratio in (0.4, 1.0):
        engine.within_ratio = ratio
        for _ in range(40):
            controller.tick()
    ticks = _replayed(path)
    assert len(ticks) == 240 + 80
    assert not any(tick.budgets_differ for tick in ticks)
    assert all(tick.recorded_reasons == tick.replayed_reasons for tick in ticks)


def test_other_settings_decide_otherwise(tmp_path: Path) -> None:
    records = _records(_record(tmp_path))
    content = records[0]["settings"] | {"slo": {"ttft_seconds": None, "itl_seconds": None}}
    ticks = list(replay(records, parse_settings(content)))
    assert any(tick.budgets_differ for tick in ticks)
    assert all(tick.replayed["decode"] >= tick.recorded["decode"] for tick in ticks)


def test_the_command_tells_the_differences_and_writes_every_tick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _record(tmp_path)
    assert not replay_files([path], None, tmp_path / "out.csv")
    assert "0 of 240 ticks differ" in capsys.readouterr().out
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert len(lines) == 241
    assert lines[0].startswith("time,prefill_recorded,prefill_replayed,")


def test_a_line_that_was_cut_short_is_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The writer was killed in it, or is still writing; another one may have gone on."""
    path = _record(tmp_path)
    whole = path.read_text()
    path.write_text(whole[:-30])
    assert not replay_files([path], None, None)
    seen = capsys.readouterr()
    assert "0 of 239 ticks differ" in seen.out
    assert "left out a line that was cut short" in seen.err
    settings = parse_settings(_records_of(whole)[0]["settings"])
    VirtualController(settings).tick()
    assert not replay_files([path], None, None)
    assert "0 of 240 ticks differ" in capsys.readouterr().out


def test_a_garbled_line_within_a_life_is_refused(tmp_path: Path) -> None:
    path = _record(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:50], lines[50][:-30] + "\n", *lines[51:]]))
    with pytest.raises(ReplayError, match="no JSON"):
        replay_files([path], None, None)


def test_a_log_without_readings_is_refused(tmp_path: Path) -> None:
    path = _record(tmp_path, every_tick=False)
    with pytest.raises(ReplayError, match=r"decision_log\.every_tick"):
        _replayed(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "does not begin with the settings"),
        ("{}\n", "Line 1 of the log cannot be replayed"),
        ('{"kind": "beginning", "settings": {}}\n', "Line 1"),
        ("garbled\n", "no JSON"),
        ("[]\n", "no JSON object"),
    ],
)
def test_what_is_no_decision_log_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(ReplayError, match=sentence):
        replay_files([path], None, None)


def test_a_log_that_is_not_there_is_refused_in_a_sentence_that_names_it_once(
    tmp_path: Path,
) -> None:
    with pytest.raises(ReplayError) as refused:
        replay_files([tmp_path / "none.jsonl"], None, None)
    assert str(refused.value) == (
        f"Cannot read the log {tmp_path / 'none.jsonl'}: No such file or directory. Give a file "
        "that the controller wrote to decision_log.path."
    )


def test_a_reading_comes_back_bit_for_bit(tmp_path: Path) -> None:
    publish_table(tmp_path / "t.tbl")
    engine = Engine(VirtualController(make_settings(tmp_path / "t.tbl")))
    engine.within_ratio, engine.queue_requests = 1 / 3, 0.1 + 0.2
    rank_times = {1: RankTime(7.0, 0.1 + 0.2, 9.0, 11.0, 1 / 3)}
    reading = replace(engine(), prefill_tokens=0.1 + 0.7, engines=3, rank_times=rank_times)
    assert reading_from_json(json.loads(json.dumps(reading_to_json(reading)))) == reading
