"""What the profiler takes from a server's answers, and which answers it refuses."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from table_factory import make_tables
from waiting import wait_until

from sglang_alloc import profile_engine
from sglang_alloc.profile_engine import ProfiledServer, ProfileError
from sglang_alloc.profile_windows import Window
from sglang_alloc.server_runs.owned_process import OwnedProcess
from sglang_alloc.shared_table import SharedTable, WorkerCounters, publish_shared_table
from sglang_alloc.worker_settings import settings_from_environment

WINDOW = Window((5, 6, 7), (8, 9))


class _Living:
    """A process that lives."""

    def poll(self) -> None:
        return None


class _Answers(BaseHTTPRequestHandler):
    answer: Any = None
    status = 200
    asked: Any = None

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        type(self).asked = json.loads(self.rfile.read(length) or "null")
        content = json.dumps(self.answer).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def answers() -> Iterator[type[_Answers]]:
    class Fresh(_Answers):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Fresh) as server:
        Fresh.port = server.server_address[1]  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Fresh
        server.shutdown()


@pytest.fixture
def server(answers: type[_Answers], tmp_path: Path) -> Iterator[ProfiledServer]:
    publish_shared_table(tmp_path / "t.tbl", make_tables())
    process = OwnedProcess("SGLang", _Living(), tmp_path / "log")  # type: ignore[arg-type]
    with SharedTable.open(tmp_path / "t.tbl") as table:
        url = f"http://127.0.0.1:{answers.port}"  # type: ignore[attr-defined]
        profiled = ProfiledServer(url, table, process)
        yield profiled
        profiled.close()


def _meta(**changes: Any) -> list[dict[str, Any]]:
    meta = {
        "prompt_tokens": 5,
        "cached_tokens": 2,
        "input_token_logprobs": [[None, 7, None], [-1.0, 8, None], [-2.0, 9, None]],
        "input_top_logprobs": [None, [[-1.0, 8, None]], [[-0.5, 3, None], [-2.0, 9, None]]],
    }
    return [{"meta_info": {**meta, **changes}}]


def test_a_continuation_is_scored_from_its_first_token(
    server: ProfiledServer, answers: type[_Answers]
) -> None:
    answers.answer = _meta()
    scored = server.score([WINDOW], top_tokens=2)
    assert (scored.losses, scored.forward_tokens) == ((1.5,), 3)
    assert scored.top_logprobs == (({8: -1.0}, {3: -0.5, 9: -2.0}),)
    assert answers.asked["input_ids"] == [[5, 6, 7, 8, 9]]
    assert answers.asked["logprob_start_len"] == [2]


@pytest.mark.parametrize("logprob", [None, float("nan"), float("-inf")])
def test_logits_that_are_not_numbers_are_refused(
    server: ProfiledServer, answers: type[_Answers], logprob: float | None
) -> None:
    answers.answer = _meta(
        input_token_logprobs=[[None, 7, None], [-1.0, 8, None], [logprob, 9, None]]
    )
    with pytest.raises(ProfileError, match="logits are not numbers"):
        server.score([WINDOW])


def test_a_prefix_that_was_not_cached_is_refused(
    server: ProfiledServer, answers: type[_Answers]
) -> None:
    answers.answer = _meta(cached_tokens=0)
    with pytest.raises(ProfileError, match="3 tokens should have come from the prefix cache"):
        server.score([WINDOW])


def test_the_next_token_s_loss_is_of_that_token(
    server: ProfiledServer, answers: type[_Answers]
) -> None:
    answers.answer = _meta(output_token_ids_logprobs=[[[-0.75, 8, None]]])
    scored = server.next_losses([WINDOW.prefix], [8])
    assert scored.losses == (0.75,)
    assert answers.asked["token_ids_logprob"] == [[8]]


def test_an_error_of_the_server_is_passed_on(
    server: ProfiledServer, answers: type[_Answers]
) -> None:
    answers.status, answers.answer = 400, {"error": "too long"}
    with pytest.raises(ProfileError, match=r"HTTP 400.*too long"):
        server.prefill([WINDOW])


def test_a_probe_counts_when_the_engine_has_acknowledged_it(
    server: ProfiledServer, tmp_path: Path
) -> None:
    with SharedTable.open(tmp_path / "t.tbl") as engine:

        def acknowledge() -> None:
            override = wait_until(lambda: engine.override(time.monotonic_ns()), "an override")
            assert override[:2] == (6, 6)
            engine.worker_slot(0).store(
                WorkerCounters(
                    pid=1, acknowledged_source=2, acknowledged_generation=override.generation
                )
            )

        thread = threading.Thread(target=acknowledge)
        thread.start()
        server.set_probe(5)
        thread.join()


def test_probes_are_routed_by_sglang_whatever_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []

    @contextlib.contextmanager
    def owned_process(*_: object, env: dict[str, str], log_path: Path) -> Iterator[OwnedProcess]:
        started.append({**os.environ, **env})
        yield OwnedProcess("SGLang", _Living(), log_path)  # type: ignore[arg-type]

    monkeypatch.setenv("SGLANG_ALLOC_ROUTING", "fused")
    monkeypatch.setattr(profile_engine, "owned_process", owned_process)
    monkeypatch.setattr(profile_engine, "wait_until_ready", lambda *_: None)
    probes = make_tables()
    with profile_engine.profiled_server(tmp_path, probes, "probe", folder=tmp_path, arguments=()):
        settings = settings_from_environment(started[0])
    assert settings is not None
    assert settings.profile_folder == tmp_path
    assert settings.routing == "engine"
