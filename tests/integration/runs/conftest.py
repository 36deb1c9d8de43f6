"""Start, stop and resume of runs against a fleet that keeps its own counts."""

from __future__ import annotations

import asyncio
import csv
import json
import signal
import time
from asyncio.subprocess import DEVNULL
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.storage.endpoints_table import read_endpoints, sum_sessions
from fanfold.backends.storage.run_folder import RunFolder, open_folder
from fanfold.backends.storage.timeline import read_timeline
from fanfold.configs.loader import load_config
from fanfold.graphs.run.prepare import prepare_run, resume_run
from fanfold.graphs.run.run_result import RunResult
from fanfold.graphs.session import RunOptions, execute_run
from fanfold.tests.support.command_server import (
    DEADLINE_S,
    Command,
    CommandProcess,
    get_command_server,
)

STREAMS = 16

TASK = {
    "system": "Judge.",
    "prompt": "What is {x}?",
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["score", "kind"],
        "properties": {
            "score": {"type": "number", "minimum": 0, "maximum": 1},
            "kind": {"type": "string", "enum": ["a", "b", "c"]},
        },
    },
}
REDUCE = [
    {"op": "top_k", "field": "score", "k": 3, "show": ["x"]},
    {"op": "histogram", "field": "kind"},
    {"op": "stats", "field": "score"},
]


class Lab:
    """Runs of one input on one fleet, in this process and in others."""

    def __init__(self, home: Path, fleet: SimulatedFleet, items: int) -> None:
        self.home, self.fleet, self.items = home, fleet, items
        self.again = 0  # items requested again in a later session
        self._asked = dict[str, int]()
        self.input = home / "input.csv"
        self.config: dict[str, Any] = {
            "name": "lab",
            "input": {"path": str(self.input), "id": "id"},
            "task": deepcopy(TASK),  # tests change it
            "endpoints": {"urls": list(fleet.urls)},
            "limits": {"streams": STREAMS},
            "shard": {"items": 20},
            "reduce": deepcopy(REDUCE),
        }
        with self.input.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "x"])
            writer.writerows([f"i{n}", f"thing {n}"] for n in range(items))

    @property
    def out(self) -> Path:
        return self.home / "run"

    def journal_lines(self) -> int:
        files = (self.out / "journal").glob("*.jsonl")
        return sum(max(0, file.read_bytes().count(b"\n") - 1) for file in files)

    async def until(self, condition: Callable[[], Any], within_s: float = DEADLINE_S) -> None:
        """Wait for a condition; asking for it takes less than a tenth of the time."""
        async with asyncio.timeout(within_s):
            began = time.thread_time()
            while not condition():
                await asyncio.sleep(max(0.005, 10 * (time.thread_time() - began)))
                began = time.thread_time()

    async def begin(self, out: Path | None = None) -> RunFolder:
        return (await prepare_run(load_config(self.config), out or self.out)).folder

    async def live(
        self, folder: RunFolder | None = None, overrides: tuple[str, ...] = (), **options: Any
    ) -> RunResult:
        """Go on with a run in this process, to whatever end."""
        folder = folder or open_folder(self.out)
        loaded = load_config(str(folder.settings), overrides) if overrides else None
        run = await resume_run(folder, loaded)
        return await execute_run(run, RunOptions(**{"quiet": True} | options), Console(quiet=True))

    async def undisturbed(self) -> list[dict[str, Any]]:
        """Return the aggregate of a run that nothing disturbs, and clear the fleet's counts."""
        result = await self.live(await self.begin(self.home / "undisturbed"))
        assert result.exit_code == 0
        self.fleet.reset()
        return result.aggregate

    @asynccontextmanager
    async def process(
        self, *arguments: str, wrap: str | None = None, group: bool = False
    ) -> AsyncIterator[CommandProcess]:
        """Run the command line in another process, which does not outlive the block."""
        settings = self.home / "config.yaml"
        settings.write_bytes(orjson.dumps(self.config))
        arguments = arguments or ("run", str(settings), "--out", str(self.out), "--json")
        command = Command(arguments, wrap, str(self.home), new_session=group)
        process = await get_command_server().start(command, stderr=DEVNULL)
        try:
            yield process
        finally:
            process.kill()
            await process.communicate()

    async def killed_at(self, lines: int, *arguments: str, after_s: float = 0) -> None:
        """Run the command line and kill it -9 some time after the journal holds so many items."""
        async with self.process(*arguments) as process:
            await self.until(lambda: self.journal_lines() >= lines)
            await asyncio.sleep(after_s)
            process.kill()
            async with asyncio.timeout(DEADLINE_S):
                assert await process.wait() == -signal.SIGKILL
        await self.until(self.fleet_is_idle)
        self.life_ended()

    def fleet_is_idle(self) -> bool:
        return not any(node["running"] + node["waiting"] for node in self.fleet.stats()["nodes"])

    def life_ended(self) -> None:
        """Count the items that were requested before this session and again in it.

        By the fleet's own books; a question that a life sends twice, as a hedge against slow
        nodes, counts once.
        """
        book = self.fleet.stats(prompts=True)["prompts"]
        asked = {key: int(question["asked"]) for key, question in book.items()}
        self.again += sum(asked[key] > times for key, times in self._asked.items())
        self._asked = asked

    def assert_whole(self, aggregate: list[dict[str, Any]], again: int) -> None:
        """Assert that each item has one row, and the aggregate is as undisturbed."""
        self.life_ended()
        ids = pq.read_table(self.out / "results.parquet").column("id").to_pylist()
        assert ids == [f"i{n}" for n in range(self.items)]
        found = json.loads((self.out / "aggregate.json").read_bytes())
        assert orjson.dumps(found["aggregate"]) == orjson.dumps(aggregate)
        assert len(self._asked) == self.items
        assert self.again <= again


def assert_timeline(out: Path) -> None:
    """Assert that the timeline adds up to the endpoints table, and that no call took no time."""
    timeline = read_timeline(out / "timeline.arrow").to_pylist()
    rows = sum_sessions(read_endpoints(out / "endpoints.parquet"))
    assert rows
    assert {bin_["endpoint"] for bin_ in timeline} == {row["endpoint"] for row in rows}
    for row in rows:
        mine = [bin_ for bin_ in timeline if bin_["endpoint"] == row["endpoint"]]
        sums = {name: sum(bin_[name] for bin_ in mine) for name in ("calls", "output_tokens")}
        assert sums == {"calls": row["calls"], "output_tokens": row["completion_tokens"]}
        failures = Counter[str]()
        for bin_ in mine:
            failures.update(dict(bin_["failures"]))
        assert failures == row["failures"]
    flown = sum(bin_["in_flight"] * bin_["seconds"] for bin_ in timeline)
    answering = sum(bin_["latency_s"] for bin_ in timeline)
    assert 0 < answering <= flown * 1.01 + 0.1


LabMaker = Callable[..., AbstractAsyncContextManager[Lab]]


@pytest.fixture
def lab_of(tmp_path: Path) -> LabMaker:
    @asynccontextmanager
    async def make(items: int = 200, **spec: Any) -> AsyncIterator[Lab]:
        """Open a lab; an answer takes about a tenth of a second."""
        slow = {"ttft_s": 0.05, "tpot_s": 0.001, "jitter": 0.3} | spec
        async with SimulatedFleet(SimulationSpec.fast(nodes=2, **slow)) as fleet:
            yield Lab(tmp_path, fleet, items)

    return make
