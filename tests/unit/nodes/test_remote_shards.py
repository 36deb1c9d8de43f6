"""Shards that run on workers, in a real superstep of LangGraph."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from typing_extensions import TypedDict

from fanfold.backends.core.errors import JournalError, RunStoppedError
from fanfold.backends.core.types import Item, Json, Shard
from fanfold.nodes.aggregators import build_aggregators
from fanfold.nodes.context import RunTools
from fanfold.nodes.shard.gate import Gate
from fanfold.nodes.shard.local import ShardPart
from fanfold.nodes.shard.remote import run_remote_shard
from fanfold.tests.unit.graphs.coordinator_lab import Lab, Site, record, summary, until

SHARDS, SIZE = 4, 5
OTHERS = build_aggregators([{"op": "count"}]).empty()
"""What no journal says: taken over only with the records that it is said to be of."""
Act = Callable[[int], Awaitable[None]]


class Rows:
    """A store of made-up items."""

    def __len__(self) -> int:
        return SHARDS * SIZE

    def read(self, lo: int, hi: int) -> list[Item]:
        return [Item(n, f"i{n}", {"x": n}) for n in range(lo, hi)]


class Workers(Site):
    """Workers that send their records home, whenever ``act`` lets them."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.act, self.home = act, list[int]()

    async def submit(self, order: dict[str, Json]) -> dict[str, Json]:
        indices = [item[0] for item in order["items"]]
        await self.act(indices[0])
        self.home.append(indices[0])
        records = [record_of(index) for index in indices]
        return summary(order["shard"], range(len(indices)), records=records, parts=OTHERS)

    async def stop(self) -> None:
        self.stops += 1
        await asyncio.Event().wait()  # some workers cannot be stopped


def record_of(index: int) -> dict[str, Json]:
    return record(index) | {"output": {}, "error_class": None}


@asynccontextmanager
async def opened(folder: Path, workers: Workers, drain_s: float = 60.0) -> AsyncIterator[RunTools]:
    lab = Lab(folder, workers, shared=False)

    async def nobody(_: Item) -> Any:
        raise AssertionError

    async with lab.opened():
        yield RunTools(
            Rows(),
            lab.ledger,
            build_aggregators([{"op": "count"}]),
            nobody,
            Gate(sys.maxsize, drain_s, "shard"),
            lab.progress,
            b"",
            True,
            coordinator=lab.coordinator,
        )


class Batch(TypedDict, total=False):
    """The state of a small graph."""

    done: Annotated[list[int], lambda one, other: one + other]


class Sent(TypedDict):
    """What a shard is sent."""

    lo: int


async def superstep(tools: RunTools) -> list[int]:
    """Send all shards, as the map-reduce graph does."""

    async def shard(state: Sent) -> dict[str, list[int]]:
        workers: Any = tools.coordinator
        range_ = Shard(state["lo"], state["lo"] + SIZE)
        part = await run_remote_shard(range_, tools, workers, lambda: None)
        return {"done": [len(part)] if part is not None else []}

    graph = StateGraph(Batch)
    graph.add_node("begin", lambda _: {"done": []})
    graph.add_node("shard", shard)
    graph.add_edge(START, "begin")
    sends = [Send("shard", {"lo": n * SIZE}) for n in range(SHARDS)]
    graph.add_conditional_edges("begin", lambda _: sends, ["shard"])
    graph.add_edge("shard", END)
    found = await graph.compile().ainvoke({"done": []})
    return list(found["done"])


@pytest.mark.parametrize("kind", [RunStoppedError, JournalError])
async def test_what_one_shard_fails_of_lets_the_others_come_home(
    kind: type[Exception], tmp_path: Path
) -> None:
    others = asyncio.Event()

    async def act(lo: int) -> None:
        if lo == 0:
            raise kind("lost 3 times")
        await others.wait()

    workers = Workers(act)
    async with opened(tmp_path, workers) as tools:
        run = asyncio.create_task(superstep(tools))
        await until(lambda: workers.stops)
        others.set()
        with pytest.raises(kind, match="lost 3 times"):
            await run
        assert sorted(workers.home) == [SIZE, 2 * SIZE, 3 * SIZE]
        assert tools.progress.done == 3 * SIZE


async def test_a_failure_waits_for_nobody_longer_than_a_drain(tmp_path: Path) -> None:
    async def act(lo: int) -> None:
        if lo == 0:
            raise RunStoppedError("lost 3 times")
        await asyncio.Event().wait()

    workers = Workers(act)
    async with opened(tmp_path, workers, drain_s=0.05) as tools:
        async with asyncio.timeout(10):
            with pytest.raises(RunStoppedError, match="lost 3 times"):
                await superstep(tools)
        assert workers.home == []


async def test_a_shard_whose_items_have_all_ended_is_finished_by_a_stop_too(tmp_path: Path) -> None:
    """Its task has not answered, but other copies have recorded what it was sent for."""

    async def act(_: int) -> None:
        for index in range(SIZE):
            tools.item_journal.put(record_of(index))
        tools.gate.close("a stop")
        await asyncio.Event().wait()

    async with opened(tmp_path, Workers(act), drain_s=0.05) as tools:
        part = await asyncio.wait_for(run_shard(tools), 10)
        assert part is not None
        assert len(part) == SIZE


async def run_shard(tools: RunTools) -> ShardPart | None:
    assert tools.coordinator is not None
    return await run_remote_shard(Shard(0, SIZE), tools, tools.coordinator, lambda: None)


async def test_a_part_of_records_that_do_not_count_is_not_taken(tmp_path: Path) -> None:
    """Records of the same items by another worker arrived while the task was out."""

    async def act(lo: int) -> None:
        tools.item_journal.put(record_of(lo))

    async with opened(tmp_path, Workers(act)) as tools:
        part, folded = await run_shard(tools), await run_shard(tools)
        assert part is not None
        assert folded is not None
        assert part.state() == folded.state() != OTHERS
        assert len(part) == SIZE


async def test_a_part_of_records_that_count_is_taken(tmp_path: Path) -> None:
    async def act(_: int) -> None:
        """Nobody else has ended any."""

    async with opened(tmp_path, Workers(act)) as tools:
        part = await run_shard(tools)
        assert part is not None
        assert part.state() == OTHERS
