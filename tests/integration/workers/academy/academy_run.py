"""A run over Academy whose agents can be found and killed, on a fleet with its own counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from fanfold.backends.simulated.fleet import SimulatedFleet

DEADLINE_S: Final = 60.0


class AcademyRun:
    """A run over Academy, on a fleet with its own counts."""

    def __init__(self, home: Path, fleet: SimulatedFleet) -> None:
        self.out, self.fleet = home / "run", fleet
        self.items = [{"id": f"i{n}", "x": f"thing {n}"} for n in range(240)]
        self.settings: dict[str, Any] = {
            "name": "academy_run",
            "task": {"prompt": "What is {x}?"},
            "endpoints": {"urls": list(fleet.urls)},
            "limits": {"streams": 16, "hedge": False},
            "shard": {"items": 20},
            "reduce": [{"op": "count"}],
        }

    def journal_lines(self) -> int:
        files = (self.out / "journal").glob("*.jsonl")
        return sum(max(0, file.read_bytes().count(b"\n") - 1) for file in files)

    def workers(self) -> list[int]:
        """Return the workers that have recorded an item, by the names of their journal files."""
        files = (self.out / "journal").glob("*-*.jsonl")
        return [int(f.stem.split("-")[-2]) for f in files if f.read_bytes().count(b"\n") > 1]

    @staticmethod
    async def until(condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - other processes set no events
                await asyncio.sleep(0.005)

    def assert_whole(self, again: int) -> None:
        """Assert that each item has one row, and that at most so many were asked twice."""
        ids = pq.read_table(self.out / "results.parquet").column("id").to_pylist()
        assert ids == [item["id"] for item in self.items]
        book = self.fleet.stats(prompts=True)["prompts"]
        assert len(book) == len(self.items)
        assert sum(question["asked"] > 1 for question in book.values()) <= again


def alive(pid: int) -> bool:
    """Say whether a process runs; one that only waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
