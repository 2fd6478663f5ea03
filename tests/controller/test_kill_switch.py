"""The kill switch: three ways on, full quality at once, and no way around it."""

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from virtual_loop import NS, VirtualController, make_settings, publish_table

from sglang_alloc_controller.control_core import ControlCore
from sglang_alloc_controller.kill_switch import KILL_VARIABLE, KillSwitch, KillSwitchError

FULL = (48, 48)


def _killable(tmp_path: Path, **sections: Any) -> tuple[VirtualController, KillSwitch]:
    publish_table(tmp_path / "t.tbl")
    fixed = {"prefill_budget": 12, "decode_budget": 10}
    settings = make_settings(tmp_path / "t.tbl", mode="fixed", fixed=fixed, **sections)
    switch = KillSwitch(tmp_path / "kill", {})
    return VirtualController(settings, kill_cause=switch.cause), switch


def test_the_file_gives_full_quality_at_the_next_tick_and_its_removal_ends_it(
    tmp_path: Path,
) -> None:
    controller, switch = _killable(tmp_path)
    assert controller.tick()[1:] == (12, 10)
    switch.path.touch()
    assert controller.tick()[1:] == FULL
    assert controller.reason("decode") == "kill_switch"
    assert controller.metric("kill_switch") == 1.0
    switch.path.unlink()
    assert controller.tick()[1:] == (12, 10)
    assert controller.metric("kill_switch") == 0.0


def test_it_ends_an_override_and_each_that_follows(tmp_path: Path) -> None:
    controller, switch = _killable(tmp_path)
    switch.engage("alice")
    for _ in range(2):
        deadline_ns = controller.clock.now_ns + 60 * NS
        controller.link.table.set_override(7, 7, deadline_ns, "bob")
        assert controller.tick()[1:] == FULL
        assert controller.link.override(controller.clock.now_ns) is None


def test_what_was_engaged_by_request_outlives_the_process_and_names_its_actor(
    tmp_path: Path,
) -> None:
    KillSwitch(tmp_path / "kill", {}).engage("alice")
    assert json.loads((tmp_path / "kill").read_text())["actor"] == "alice"
    switch = KillSwitch(tmp_path / "kill", {})
    assert switch.cause() == f"file {tmp_path / 'kill'}"
    switch.release()
    assert switch.cause() is None


def test_removing_the_file_ends_what_was_engaged_by_request(tmp_path: Path) -> None:
    switch = KillSwitch(tmp_path / "kill", {})
    switch.engage("alice")
    switch.path.unlink()
    assert switch.cause() is None


def test_a_file_that_cannot_be_written_does_not_keep_it_off(tmp_path: Path) -> None:
    switch = KillSwitch(tmp_path / "none" / "kill", {})
    with pytest.raises(KillSwitchError, match="until this controller stops"):
        switch.engage("alice")
    assert switch.cause() == "http alice"


def test_on_a_full_disk_the_empty_file_holds_it_on(tmp_path: Path) -> None:
    # A file size limit stands in for a full disk: the kernel makes the file and writes nothing.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    switch = KillSwitch(tmp_path / "kill", {})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        switch.engage("alice")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert switch.path.read_text() == ""
    assert switch.cause() == f"file {switch.path}"
    switch.path.unlink()
    assert switch.cause() is None


@pytest.mark.parametrize(("value", "on"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_the_environment_holds_it_on(tmp_path: Path, value: str, on: bool) -> None:
    switch = KillSwitch(tmp_path / "kill", {KILL_VARIABLE: value})
    assert (switch.cause() is not None) == on
    if on:
        with pytest.raises(KillSwitchError, match=KILL_VARIABLE):
            switch.release()


def test_a_file_that_cannot_be_looked_for_counts_as_there(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert KillSwitch(loop / "kill", {}).cause() is not None


def test_in_control_the_law_begins_anew_from_full_quality(tmp_path: Path) -> None:
    publish_table(tmp_path / "t.tbl")
    switch = KillSwitch(tmp_path / "kill", {})
    controller = VirtualController(make_settings(tmp_path / "t.tbl"), kill_cause=switch.cause)
    controller.link.write(10, 10)
    switch.engage("alice")
    assert controller.tick()[1:] == FULL
    switch.release()
    assert controller.tick()[1:] == FULL


def _broken(*arguments: object) -> Any:
    raise ZeroDivisionError


@pytest.mark.parametrize("part", ["source", "follow_config", "show"])
def test_a_fault_in_any_other_part_of_a_tick_does_not_keep_it_off(
    tmp_path: Path, part: str
) -> None:
    publish_table(tmp_path / "t.tbl")
    switch = KillSwitch(tmp_path / "kill", {})
    surroundings = {} if part == "source" else {part: _broken}
    controller = VirtualController(
        make_settings(tmp_path / "t.tbl"), kill_cause=switch.cause, **surroundings
    )
    if part == "source":
        controller.source = _broken
    controller.run_for(1)
    controller.link.write(10, 10)
    switch.engage("alice")
    controller.run_for(1)
    assert controller.link.selector()[1:] == FULL
    assert controller.link.table.heartbeat_ns() == controller.clock.now_ns - NS // 2
    assert controller.metric("tick_errors_total") >= 4


def test_a_fault_of_the_law_does_not_keep_it_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_table(tmp_path / "t.tbl")
    controller = VirtualController(make_settings(tmp_path / "t.tbl"), kill_cause=lambda: "file x")
    controller.link.write(10, 10)
    monkeypatch.setattr(ControlCore, "order", _broken)
    controller.run_for(1)
    assert controller.link.selector()[1:] == FULL
