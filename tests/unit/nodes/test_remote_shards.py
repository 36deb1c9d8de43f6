"""Shards that run on workers, in a real superstep of LangGraph."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from typing_extensions import TypedDict

from fanfold.backends.core.errors import JournalError, RunStoppedError
from fanfold.backends.core.messages import ShardResult, ShardTask
from fanfold.backends.core.types import Item, Json, Shard
from fanfold.backends.storage.journal import Journal
from fanfold.nodes.aggregators import build_aggregators
from fanfold.nodes.context import AnsweredTask, RunTools
from fanfold.nodes.shard.gate import Gate
from fanfold.nodes.shard.progress import Progress
from fanfold.nodes.shard.remote import run_remote_shard

SHARDS, SIZE = 4, 5
OTHERS = build_aggregators([{"op": "count"}]).empty()
"""What no journal says: taken over only with the records that it is said to be of."""
Act = Callable[[Shard], Awaitable[None]]


class Rows:
    """A store of made-up items."""

    def __len__(self) -> int:
        return SHARDS * SIZE

    def read(self, lo: int, hi: int) -> list[Item]:
        return [Item(n, f"i{n}", {"x": n}) for n in range(lo, hi)]


@dataclass
class Workers:
    """Workers that send their records home, whenever ``act`` lets them."""

    act: Act
    has_node_endpoints: bool = False
    in_flight: int = 0
    nodes: tuple[int, int] = (1, 1)
    home: list[int] = field(default_factory=list)
    stops: int = 0

    async def run_shard(
        self, shard: Shard, remaining: Callable[[], Awaitable[list[Item]]]
    ) -> AnsweredTask | None:
        items = await remaining()
        await self.act(shard)
        self.home.append(shard.lo)
        name, indices = f"{shard.lo}-{shard.hi}", [item.index for item in items]
        order: Any = ShardTask(name, 0, "0", {}, {}, [], None, None, 1, 1.0)
        order.items.extend((item.index, item.id, item.row, None) for item in items)
        records = [record(index) for index in indices]
        tally = {"done": len(items)}
        return order, ShardResult(name, 0, "0", "w:1", tally=tally, records=records, parts=OTHERS)

    async def refresh(self, worker: str | None = None) -> None:
        """Nothing is shared."""

    async def stop(self) -> None:
        self.stops += 1
        await asyncio.Event().wait()  # some workers cannot be stopped

    async def finish_reading(self) -> None:
        """Nothing is shared."""


def record(index: int) -> dict[str, Json]:
    numbers = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "lost_tokens")
    kept = {"index": index, "id": f"i{index}", "status": "done", "output": {}, "error_class": None}
    sums = dict.fromkeys((*numbers, "useful_tokens", "nano_usd", "useful_nano_usd"), 1)
    return kept | sums | {"reused": 0, "finished_at": "2026-01-01"}


@asynccontextmanager
async def opened(folder: Path, act: Act, drain_s: float = 60.0) -> AsyncIterator[RunTools]:
    ledger = Journal(folder, "r", SHARDS * SIZE)
    ledger.start_session("test", 0.001)
    gate = Gate(sys.maxsize, drain_s, "shards")

    async def nobody(_: Item) -> Any:
        raise AssertionError

    reduce = build_aggregators([{"op": "count"}])
    workers = Workers(act)
    tools = RunTools(
        Rows(), ledger, reduce, nobody, gate, Progress(), b"", True, coordinator=workers
    )
    try:
        yield tools
    finally:
        await ledger.aclose()


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

    async def act(shard: Shard) -> None:
        if shard.lo == 0:
            raise kind("lost 3 times")
        await others.wait()

    async with opened(tmp_path, act) as tools:
        run = asyncio.create_task(superstep(tools))
        workers: Any = tools.coordinator
        while not workers.stops:  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.001)
        others.set()
        with pytest.raises(kind, match="lost 3 times"):
            await run
        assert sorted(workers.home) == [SIZE, 2 * SIZE, 3 * SIZE]
        assert tools.item_journal.count_items().done == 3 * SIZE  # type: ignore[attr-defined]


async def test_a_failure_waits_for_nobody_longer_than_a_drain(tmp_path: Path) -> None:
    async def act(shard: Shard) -> None:
        if shard.lo == 0:
            raise RunStoppedError("lost 3 times")
        await asyncio.Event().wait()

    async with opened(tmp_path, act, drain_s=0.05) as tools:
        async with asyncio.timeout(10):
            with pytest.raises(RunStoppedError, match="lost 3 times"):
                await superstep(tools)
        assert tools.coordinator.home == []  # type: ignore[union-attr]


async def test_a_part_of_records_that_do_not_count_is_not_taken(tmp_path: Path) -> None:
    """Records of the same items by another worker arrived while the task was out."""

    async def act(shard: Shard) -> None:
        tools.item_journal.put(record(shard.lo))

    async with opened(tmp_path, act) as tools:
        workers: Any = tools.coordinator
        part = await run_remote_shard(Shard(0, SIZE), tools, workers, lambda: None)
        folded = await run_remote_shard(Shard(0, SIZE), tools, workers, lambda: None)
        assert part is not None
        assert folded is not None
        assert part.state() == folded.state() != OTHERS
        assert len(part) == SIZE


async def test_a_part_of_records_that_count_is_taken(tmp_path: Path) -> None:
    async def act(_: Shard) -> None:
        """Nobody else has ended any."""

    async with opened(tmp_path, act) as tools:
        workers: Any = tools.coordinator
        part = await run_remote_shard(Shard(0, SIZE), tools, workers, lambda: None)
        assert part is not None
        assert part.state() == OTHERS
