"""One real controller that a person gives orders to: by HTTP, by file, by signal."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from controller_process import ControllerProcess, call, running, write_config
from stand_in_server import serving
from virtual_loop import publish_table

from sglang_alloc.shared_table import SharedTable

FULL = (48, 48)


class Operated:
    """A controller in fixed mode at (20, 21), its table and its configuration."""

    def __init__(self, controller: ControllerProcess, config: Path, table: SharedTable) -> None:
        self.controller, self.config, self.table = controller, config, table

    def write_config(self, **sections: object) -> None:
        content = yaml.safe_load(self.config.read_text()) | sections
        self.config.write_text(yaml.safe_dump(content))

    def wait_for_budgets(self, prefill: int, decode: int) -> None:
        wanted = (prefill, decode)
        self.controller.wait_for(lambda: self.table.selector()[1:] == wanted, f"{wanted}")


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    folder = tmp_path_factory.mktemp("operated")
    publish_table(folder / "t.tbl")
    page = (Path(__file__).parent / "recorded" / "first.txt").read_text()
    with serving(page) as server, SharedTable.open(folder / "t.tbl") as table:
        config = write_config(
            folder,
            server.url,
            mode="fixed",
            fixed={"prefill_budget": 20, "decode_budget": 21},
            decision_log={"path": str(folder / "d.jsonl"), "every_tick": True},
        )
        with running(config) as controller:
            one = Operated(controller, config, table)
            one.wait_for_budgets(20, 21)
            yield one


def test_the_kill_switch_by_http_lasts_until_it_is_released(operated: Operated) -> None:
    answer = operated.controller.order("/killswitch", on=True, actor="alice")
    assert answer.status_code == 200
    operated.wait_for_budgets(*FULL)
    file = operated.table.path.with_name("t.tbl.kill")
    assert json.loads(file.read_text())["actor"] == "alice"
    assert operated.controller.order("/killswitch", on=False).json()["cause"] is None
    operated.wait_for_budgets(20, 21)
    assert not file.exists()
    assert "kill_switch_ordered" in operated.controller.log()


def test_the_kill_switch_by_file_needs_no_http(operated: Operated) -> None:
    file = operated.table.path.with_name("t.tbl.kill")
    file.touch()
    operated.wait_for_budgets(*FULL)
    assert operated.controller.has("sglang_alloc_controller_kill_switch 1.0")
    file.unlink()
    operated.wait_for_budgets(20, 21)


def test_an_override_by_http_has_a_limit_and_an_actor_and_can_be_cleared(
    operated: Operated,
) -> None:
    controller = operated.controller
    assert "time limit" in controller.order("/override", prefill=9).json()["problem"]
    refused = controller.order("/override", prefill=999, seconds=60)
    assert refused.status_code == 409
    set_to = controller.order("/override", prefill=9, seconds=60, actor="bob").json()["override"]
    assert (set_to["prefill"], set_to["decode"]) == (9, 21)
    reason = 'sglang_alloc_controller_reason{phase="prefill",reason="override"} 1.0'
    controller.wait_for(lambda: controller.has(reason), "the reason")
    assert controller.order("/override", clear=True).status_code == 200
    controller.wait_for(lambda: not controller.has(reason), "the end of the override")


def test_a_configuration_with_a_mistake_is_refused_and_the_last_good_one_stays(
    operated: Operated,
) -> None:
    operated.write_config(mode="automatic")
    answer = operated.controller.order("/reload")
    assert answer.status_code == 409
    assert "mode is 'automatic'" in answer.json()["problem"]
    assert operated.table.selector()[1:] == (20, 21)
    assert operated.controller.has("sglang_alloc_controller_config_last_reload_successful 0.0")
    operated.write_config(mode="fixed", fixed={"prefill_budget": 30, "decode_budget": 31})
    operated.wait_for_budgets(30, 31)
    assert operated.controller.has("sglang_alloc_controller_config_last_reload_successful 1.0")


def test_sighup_reads_the_configuration_again(operated: Operated) -> None:
    before = operated.controller.log().count("config_reloaded")
    operated.controller.process.send_signal(signal.SIGHUP)
    operated.controller.wait_for(
        lambda: operated.controller.log().count("config_reloaded") > before, "a reload"
    )
    operated.write_config(fixed={"prefill_budget": 20, "decode_budget": 21})
    operated.wait_for_budgets(20, 21)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/killswitch", {"on": "yes"}),
        ("/killswitch", {}),
        ("/override", {"prefill": 9, "seconds": 100_000}),
        ("/override", {"prefill": True, "seconds": 5}),
        ("/override", {"prefil": 9, "seconds": 5}),
        ("/override", {"prefill": 9, "seconds": 5, "actor": ""}),
    ],
)
def test_an_order_that_makes_no_sense_changes_nothing(
    operated: Operated, path: str, content: dict[str, object]
) -> None:
    assert operated.controller.order(path, **content).status_code == 409
    assert operated.table.selector()[1:] == (20, 21)
    assert operated.table.override(0) is None


def test_an_override_outlives_the_controller_and_the_log_says_so(tmp_path: Path) -> None:
    publish_table(tmp_path / "t.tbl")
    config = write_config(tmp_path, "http://127.0.0.1:9")
    with running(config) as controller, SharedTable.open(tmp_path / "t.tbl") as table:
        controller.wait_for(lambda: table.heartbeat_ns() > 0, "a beat")
        assert controller.order("/override", prefill=9, seconds=600, actor="bob").status_code == 200
        assert controller.stop() == 0
        override = table.override(time.monotonic_ns())
        assert override is not None
        assert override.actor == "bob"
        assert table.selector()[1:] == FULL
        told = json.loads(controller.log().splitlines()[-2])
        assert (told["event"], told["actor"], told["prefill"]) == ("override_stays", "bob", 9)
        assert 500 < told["seconds_left"] <= 600


def test_what_it_recorded_meanwhile_can_be_replayed(operated: Operated) -> None:
    log = operated.config.parent / "d.jsonl"
    replayed = call("replay", str(log))
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert " 0 of " in f" {replayed.stdout}"
