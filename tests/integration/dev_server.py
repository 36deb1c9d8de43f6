"""The real ``langgraph dev``, started once for all tests that need the same variables."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(str(files("fanfold")))
START_S = 90


class Server:
    """``langgraph dev`` with the repository's own langgraph.json, in a folder of its own.

    Args:
        folder: The folder.
        root: The checkout that it serves.
        python: The Python beside which the command ``langgraph`` is installed.
        **variables: What its owner sets in its environment.
    """

    def __init__(
        self, folder: Path, root: Path = ROOT, python: str = sys.executable, **variables: str
    ) -> None:
        self.folder, self.log, self.variables = folder, folder / "log", variables
        self.python = python
        config = json.loads((root / "langgraph.json").read_text()) | {"dependencies": [str(root)]}
        (folder / "langgraph.json").write_text(json.dumps(config))
        (folder / ".env").write_text("FLEET_KEY=sesame\n")
        self.url = ""

    def start(self) -> None:
        """Start it on a free port; should that be taken meanwhile, it chooses and logs another."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(Path(self.python).with_name("langgraph")), "dev", "--no-browser"]
        options = ["--no-reload", "--host", "127.0.0.1", "--port", str(port)]
        more = {"LANGGRAPH_CLI_NO_ANALYTICS": "1", "LANGGRAPH_NO_VERSION_CHECK": "true"}
        keys = ("LANGSMITH_API_KEY", "LANGCHAIN_API_KEY", "OPENAI_API_KEY")
        environment = {k: v for k, v in os.environ.items() if k not in keys}
        environment |= more | self.variables
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *options, "--n-jobs-per-worker", "2"],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
            )
        self.url, deadline = "", time.monotonic() + START_S
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def _answers(self) -> bool:
        if not (named := re.findall(r"http://[\d.]+:\d+(?=/docs)", self.log.read_text())):
            return False
        self.url = named[-1]
        try:
            with urllib.request.urlopen(f"{self.url}/ok", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False  # not listening yet

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Start a server and stop it; its detector of blocking calls is on."""
    server.start()
    try:
        yield server
        assert "BlockingError" not in server.log.read_text()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def dev_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose owner lets requests choose the endpoints."""
    folder = tmp_path_factory.mktemp("studio")
    with running(Server(folder, FANFOLD_SERVER_ALLOW="endpoints,endpoints.api_key")) as one:
        yield one


@pytest.fixture(scope="session")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose owner opens nothing but a folder to read from."""
    folder = tmp_path_factory.mktemp("closed")
    (folder / "shared").mkdir()
    with running(Server(folder, FANFOLD_SERVER_ROOT=str(folder / "shared"))) as one:
        yield one
