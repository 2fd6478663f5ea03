"""Orders by HTTP: who is named, whatever the container knows of its user."""

import json
import os
import pwd
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from virtual_loop import publish_table

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.shared_table import SharedTable
from sglang_alloc_controller.config_follower import ReloadOutcome
from sglang_alloc_controller.control_api import orders
from sglang_alloc_controller.kill_switch import KillSwitch
from sglang_alloc_controller.metrics_server import Answer


class Desk:
    """The orders of one controller, without its HTTP server."""

    def __init__(self, folder: Path) -> None:
        publish_table(folder / "t.tbl")
        self.table = SharedTable.open(folder / "t.tbl")
        self.kill_switch = KillSwitch(folder / "kill", {})
        self._orders = orders(
            self.kill_switch, lambda: self.table, lambda _: ReloadOutcome(True, "read"), lambda: 1
        )

    def __call__(self, path: str, content: Mapping[str, Any]) -> Answer:
        return self._orders[path](content)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def nameless_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without an entry in /etc/passwd and without a name in the environment."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("nameless_user")
def test_the_kill_switch_works_for_a_user_without_a_name(desk: Desk) -> None:
    assert desk("/killswitch", {"on": True, "actor": "alice"}).status == 200
    assert desk.kill_switch.cause() is not None
    assert desk("/killswitch", {"on": False}).status == 200
    assert desk.kill_switch.cause() is None


@pytest.mark.usefixtures("nameless_user")
def test_a_user_without_a_name_is_named_by_number(desk: Desk) -> None:
    desk("/override", {"prefill": 20, "seconds": 60})
    override = desk.table.override(1)
    assert override is not None
    assert override.actor == f"http by uid {os.getuid()}"


def test_every_order_of_the_deploy_page_is_obeyed_and_carries_the_token(desk: Desk) -> None:
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    sent = re.findall(r"^curl -s http://localhost:\d+(/\w+) (.*?)-d '(.*?)'$", page, re.M | re.S)
    assert [path for path, _, _ in sent] == ["/killswitch", "/override", "/reload"]
    for path, headers, body in sent:
        assert '-H "Authorization: Bearer $TOKEN"' in headers
        assert desk(path, json.loads(body)).status == 200
        desk.kill_switch.release()  # while it is on, no override is taken
    override = desk.table.override(1)
    assert override is not None
    assert (override.prefill_budget, override.decode_budget) == (30, 20)


def test_no_override_gets_past_the_kill_switch_and_one_can_be_cleared(desk: Desk) -> None:
    desk("/killswitch", {"on": True, "actor": "alice"})
    with pytest.raises(ConfigurationError, match=r"kill switch is on \(file .*Release it first"):
        desk("/override", {"prefill": 20, "seconds": 60})
    assert desk.table.override(1) is None
    assert desk("/override", {"clear": True}).status == 200
    desk("/killswitch", {"on": False})
    assert desk("/override", {"prefill": 20, "seconds": 60}).status == 200


@pytest.mark.parametrize("actor", ["", 7, "a" * 65, "ä" * 33])
def test_an_actor_that_the_table_cannot_hold_is_refused(desk: Desk, actor: object) -> None:
    with pytest.raises(ConfigurationError, match="actor"):
        desk("/override", {"prefill": 20, "seconds": 60, "actor": actor})
    assert desk.table.override(1) is None
