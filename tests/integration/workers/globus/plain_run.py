"""Runs against a model server that counts its requests, started by a test or by a worker."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from fanfold.backends.workers import registry
from fanfold.backends.workers.globus.backend import TaskSubmitter
from fanfold.configs.loader import load_config
from fanfold.graphs.run.prepare import prepare_run
from fanfold.graphs.run.run_result import RunResult
from fanfold.graphs.session import RunOptions, execute_run
from fanfold.tests.integration.servers.conftest import PLAIN, free_port

from .client import URL_VARIABLE
from .globus_run import QUICK, HasId, recorded
from .logins import LOGIN
from .service import GlobusService

START_S = 30.0


class PlainRun:
    """A run of some questions on endpoints; each question is its item's id.

    Args:
        home: A folder for input, answers and run.
        endpoints: The endpoints.
    """

    def __init__(self, home: Path, endpoints: tuple[HasId, ...]) -> None:
        self.home, self.port, self.out = home, free_port(), home / "run"
        self._asked, self._answers = home / "asked", home / "answers"
        self._answers.mkdir()
        self.items: list[str] = []
        self.config: dict[str, Any] = {
            "name": "plain",
            "input": {"path": str(home / "in.jsonl"), "id": "id"},
            "task": {"prompt": "{id}"},
            "model": {"name": "plain"},
            "endpoints": {"urls": [f"http://127.0.0.1:{self.port}"]},
            "limits": {"streams": 8, "drain_s": 1.0, "request_timeout_s": 20.0, "hedge": False},
            "backend": {
                "kind": "globus_compute",
                "endpoints": [endpoint.endpoint_id for endpoint in endpoints],
                "client": LOGIN,
                "workers": 2 * len(endpoints),
            },
        }

    def ask(self, answers: list[str], texts: list[str] | None = None) -> None:
        """Write the input, an item per answer, with a text beside each id if given."""
        self.items = [f"q{n}" for n in range(len(answers))]
        for name, answer in zip(self.items, answers, strict=True):
            (self._answers / name).write_text(answer)
        rows = [{"id": name} for name in self.items]
        if texts is not None:
            rows = [row | {"text": text} for row, text in zip(rows, texts, strict=True)]
        (self.home / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))

    def command(self, takes_s: float = 0.02) -> list[str]:
        """Return the command of the model server; its port is to be filled in."""
        words = [f"asked:{self._asked}", f"says:{self._answers}", f"takes:{takes_s}"]
        return [sys.executable, "-I", "-S", PLAIN, "{port}", *words]

    @contextmanager
    def serving(self, takes_s: float = 0.02) -> Iterator[None]:
        """Serve the model while the block runs."""
        command = [str(self.port) if word == "{port}" else word for word in self.command(takes_s)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
            try:
                _wait_listening(self.port)
                yield
            finally:
                server.kill()

    def asked(self) -> Counter[str]:
        """Return how often each question was asked, by the server's own list."""
        return Counter(self._asked.read_text().split()) if self._asked.exists() else Counter()

    async def live(self, overrides: tuple[str, ...] = ()) -> RunResult:
        """Begin the run in this process, to whatever end."""
        run = await prepare_run(load_config(self.config, overrides), self.out)
        return await execute_run(run, RunOptions(quiet=True), Console(quiet=True))

    def assert_each_once(self, again: int = 0) -> None:
        """Assert that each item has one record, and how many requests were made twice."""
        assert recorded(self.out) == dict.fromkeys(self.items, 1)
        asked = self.asked()
        assert asked.keys() == set(self.items)
        assert asked.total() - len(self.items) <= again


def _wait_listening(port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the model server did not start"
            time.sleep(0.02)
        else:
            return


PlainRunOf = Callable[..., PlainRun]


@pytest.fixture
def plain_run_on(
    service: GlobusService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PlainRunOf:
    """Make runs whose shards go to endpoints; this process asks the service often."""

    monkeypatch.setenv(URL_VARIABLE, service.url)
    monkeypatch.setattr(registry, "TaskSubmitter", partial(TaskSubmitter, policy=QUICK))
    return lambda *endpoints: PlainRun(tmp_path, endpoints)
