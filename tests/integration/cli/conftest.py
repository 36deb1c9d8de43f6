from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.graphs.cli import app as command_line

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["score"],
    "properties": {
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "label": {"type": "string", "enum": ["a", "b"]},
    },
}


@dataclass
class Said:
    code: int
    out: str
    err: str


@dataclass
class Shell:
    """A scratch folder with an input and a configuration, and the command line in this process."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch
    config: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *arguments: str | Path) -> Said:
        self.patch.setattr(sys, "argv", ["fanfold", *map(str, arguments)])
        self.capture.readouterr()
        code: str | int | None = 0
        try:
            command_line.main()
        except SystemExit as end:
            code = end.code
        out, err = self.capture.readouterr()
        assert isinstance(code, int)
        return Said(code, out, err)

    def write(self, **sections: Any) -> None:
        """Write c.yaml: the good configuration with sections replaced, or left out if None."""
        given = self.config | sections
        text = yaml.safe_dump({k: v for k, v in given.items() if v is not None})
        (self.folder / "c.yaml").write_text(text)

    def files(self) -> dict[str, tuple[int, int]]:
        found = [p for p in self.folder.rglob("*") if p.name != "lock"]
        return {
            str(p.relative_to(self.folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in found
        }


@pytest.fixture
def shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "in.csv").write_text("id,text\n1,one\n2,two\n3,three\n")
    made = Shell(tmp_path, capsys, monkeypatch)
    made.config = {
        "name": "t",
        "input": {"path": "in.csv", "id": "id"},
        "task": {"prompt": "Say {text}", "schema": SCHEMA},
        "endpoints": {"simulated": {"nodes": 1, "time_scale": 50}},
        "reduce": [{"op": "top_k", "field": "score", "k": 3}],
    }
    made.write()
    handlers = list(logging.root.handlers)
    yield made
    for handler in set(logging.root.handlers) - set(handlers):
        logging.root.removeHandler(handler)  # it writes to this test's standard error
    assert os.getcwd() == str(tmp_path)  # noqa: PTH109 - what the process itself says


@dataclass
class Served:
    urls: tuple[str, ...]
    stats: Callable[[], dict[str, Any]]

    @property
    def requests(self) -> int:
        total: int = self.stats()["totals"]["requests"]
        return total


@pytest.fixture
def fleet() -> Iterator[Served]:
    """A simulated fleet in a thread, as a stranger's server would be: known by URLs only."""
    ready, box = threading.Event(), list[Any]()

    async def serve() -> None:
        stop = asyncio.Event()
        async with SimulatedFleet(SimulationSpec(nodes=2, time_scale=50)) as running:
            box.extend([running, stop, asyncio.get_running_loop()])
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(20)
    running, stop, loop = box

    async def stats() -> dict[str, Any]:
        found: dict[str, Any] = running.stats()
        return found

    yield Served(running.urls, lambda: asyncio.run_coroutine_threadsafe(stats(), loop).result(20))
    loop.call_soon_threadsafe(stop.set)
    thread.join()
