from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import (
    GraphDrained,
    GraphInterrupt,
    GraphRecursionError,
    InvalidUpdateError,
    NodeCancelledError,
    NodeTimeoutError,
    ParentCommand,
)
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import RunControl, Runtime
from langgraph.types import Command
from typing_extensions import TypedDict

from fanfold.backends.core.errors import (
    ConfigurationError,
    EndpointLostError,
    JournalError,
    RunStoppedError,
)
from fanfold.backends.core.protocols import CURRENT_CALLS
from fanfold.backends.core.types import Item, Shard
from fanfold.backends.storage.journal import Journal
from fanfold.graphs.run.item_engine import make_item_variables, stop_at_engine_errors
from fanfold.nodes.aggregators import build_aggregators
from fanfold.nodes.context import ItemContext, RunTools
from fanfold.nodes.item.item_state import ItemState
from fanfold.nodes.shard.gate import Gate
from fanfold.nodes.shard.local import ShardPart, run_local_shard
from fanfold.nodes.shard.progress import Progress

TOTAL = 200
NO_CONTEXT: Any = None


@dataclass
class Rows:
    """A store of made-up items."""

    total: int = TOTAL

    def __len__(self) -> int:
        return self.total

    def read(self, lo: int, hi: int) -> list[Item]:
        return [Item(n, f"i{n}", {"x": n}) for n in range(lo, hi)]


@dataclass(frozen=True)
class JournalTools(RunTools):
    """Tools whose journal is read back."""

    item_journal: Journal


@dataclass
class Bench:
    """An open run whose items are run by ``act``."""

    folder: Path
    act: Callable[[Item], Awaitable[ItemState]]
    streams: int = 8
    drain_s: float = 60.0
    reduce: list[dict[str, Any]] = field(default_factory=lambda: [{"op": "count"}])
    asked: list[int] = field(default_factory=list)
    peak: int = 0
    reason: str | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[JournalTools]:
        ledger = Journal(self.folder, "r", TOTAL)
        ledger.start_session("test", 0.001)
        gate = Gate(self.streams, self.drain_s)

        async def run_item(item: Item) -> ItemState:
            self.asked.append(item.index)
            self.peak = max(self.peak, gate.in_flight)
            return await self.act(item)

        try:
            yield JournalTools(
                Rows(),
                ledger,
                build_aggregators(self.reduce),
                run_item,
                gate,
                Progress(),
                b"",
                True,
                make_item_variables=make_item_variables,
            )
        finally:
            await ledger.aclose()

    async def work(self, tools: RunTools, lo: int = 0, hi: int = TOTAL) -> ShardPart | None:
        return await run_local_shard(Shard(lo, hi), tools, lambda: self.reason)


async def answer(item: Item) -> ItemState:
    await asyncio.sleep(0)
    return {"output": {"x": item.index}}


async def test_all_items_once_within_the_bound(tmp_path: Path) -> None:
    bench = Bench(tmp_path, answer)
    async with bench.open() as tools:
        part = await bench.work(tools)
        assert part is not None
        assert len(part) == TOTAL
        assert part.to_update()["tally"] == {"done": TOTAL, "failed": 0}
        assert tools.gate.in_flight == 0
        assert tools.progress.done == TOTAL
    assert sorted(bench.asked) == list(range(TOTAL))
    assert bench.peak == bench.streams


async def test_finished_items_are_folded_not_asked(tmp_path: Path) -> None:
    first = Bench(tmp_path, answer)
    async with first.open() as tools:
        await first.work(tools, 30, 130)
    second = Bench(tmp_path, answer)
    async with second.open() as tools:
        part = await second.work(tools)
        assert part is not None
        assert part.to_update()["tally"] == {"done": TOTAL, "failed": 0}
    assert sorted(second.asked) == [*range(30), *range(130, TOTAL)]
    third = Bench(tmp_path, answer, reduce=[{"op": "collect", "limit": TOTAL}])
    async with third.open() as tools:  # all at once, in one thread
        folded = await third.work(tools)
        assert folded is not None
        assert folded.to_update()["tally"] == {"done": TOTAL, "failed": 0}
        (collected,) = tools.aggregators.present(folded.state())
    assert [row["id"] for row in collected["rows"]] == [f"i{n}" for n in range(TOTAL)]
    assert third.asked == []


async def test_open_items_begin_before_finished_ones_are_folded(tmp_path: Path) -> None:
    first = Bench(tmp_path, answer)
    async with first.open() as tools:
        await first.work(tools, 0, 130)
    last_began = asyncio.Event()

    async def act(item: Item) -> ItemState:
        if item.index == TOTAL - 1:
            last_began.set()
        return await answer(item)

    second = Bench(tmp_path, act)
    async with second.open() as tools:
        async with tools.folding:  # as another shard that folds has it
            working = asyncio.create_task(second.work(tools))
            await last_began.wait()
        part = await working
        assert part is not None
        assert part.to_update()["tally"] == {"done": TOTAL, "failed": 0}


async def test_what_is_returned_is_on_disk(tmp_path: Path) -> None:
    bench = Bench(tmp_path, answer)
    async with bench.open() as tools:
        await bench.work(tools)
        writer = tools.item_journal._writer
        assert writer is not None
        assert writer._flushed == writer._written


class CustomError(Exception):
    """What a user's graph may raise."""


@pytest.mark.parametrize(
    ("error", "name", "text"),
    [
        (CustomError("odd \ud800"), "CustomError", "odd ?"),
        (KeyError(), "KeyError", "KeyError()"),
        (EndpointLostError("reset", "e"), "EndpointLostError", "reset"),
        (TimeoutError(), "TimeoutError", "TimeoutError()"),
    ],
)
async def test_what_an_item_raises_is_its_end(
    tmp_path: Path, error: BaseException, name: str, text: str
) -> None:
    async def act(item: Item) -> ItemState:
        if item.index == 5:
            raise error
        return await answer(item)

    bench = Bench(tmp_path, act)
    async with bench.open() as tools:
        part = await bench.work(tools)
        assert part is not None
        assert part.to_update()["tally"] == {"done": TOTAL - 1, "failed": 1}
        record = tools.item_journal.read_record(5)
        assert (record["error_class"], record["error"]) == (name, text)
        assert record["output"] is None


@pytest.mark.parametrize(
    "error",
    [
        GraphRecursionError("limit of 3 reached"),
        InvalidUpdateError("two values"),
        GraphDrained("SIGTERM"),
        GraphInterrupt([]),
        ParentCommand(Command(goto="x")),
        NodeTimeoutError("n", 1.0, kind="run", run_timeout=1.0),
        NodeCancelledError("n"),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_of_the_engine_is_no_items_end(tmp_path: Path, error: BaseException) -> None:
    """It stops the run; the item has no record, and is asked when the run goes on."""

    async def stopped(_state: ItemState, _context: ItemContext) -> ItemState:
        raise error

    engine = stop_at_engine_errors(stopped)

    async def act(item: Item) -> ItemState:
        if item.index == 5:
            return await engine(ItemState(id=item.id), NO_CONTEXT)
        return await answer(item)

    first = Bench(tmp_path, act)
    async with first.open() as tools:
        assert await first.work(tools) is None
        assert isinstance(tools.gate.error, RunStoppedError)
        assert "resume the run" in tools.gate.error.message
        assert not tools.item_journal.is_finished(5)
    second = Bench(tmp_path, answer)
    async with second.open() as tools:
        part = await second.work(tools)
        assert part is not None
        assert part.to_update()["tally"] == {"done": TOTAL, "failed": 0}
    assert not set(first.asked) & set(second.asked) - {5}


@pytest.mark.parametrize(
    "error", [RunStoppedError("no node"), ConfigurationError("wrong"), JournalError("full")]
)
async def test_what_ends_the_run_lets_items_in_flight_finish(
    tmp_path: Path, error: Exception
) -> None:
    go = asyncio.Event()

    async def act(item: Item) -> ItemState:
        if item.index == 4:
            go.set()
            raise error
        await go.wait()
        return await answer(item)

    bench = Bench(tmp_path, act)
    async with bench.open() as tools:
        assert await bench.work(tools) is None
        assert tools.gate.error is error
        recorded = [record["index"] for record in tools.item_journal.read_records()]
    assert recorded == sorted(set(bench.asked) - {4})
    assert len(bench.asked) < TOTAL


@pytest.mark.parametrize("how", ["gate", "drain"])
async def test_a_stop_loses_and_repeats_nothing(tmp_path: Path, how: str) -> None:
    async def act(item: Item) -> ItemState:
        if item.index == 20:
            if how == "gate":
                tools.gate.close("SIGTERM")
            else:
                bench.reason = "drain"
        return await answer(item)

    bench = Bench(tmp_path, act)
    async with bench.open() as tools:
        assert await bench.work(tools) is None
        assert tools.gate.reason == ("SIGTERM" if how == "gate" else "drain")
        recorded = [record["index"] for record in tools.item_journal.read_records()]
    assert recorded == sorted(bench.asked)
    assert len(recorded) < TOTAL
    again = Bench(tmp_path, answer)
    async with again.open() as tools:
        assert await again.work(tools) is not None
    assert sorted(again.asked + bench.asked) == list(range(TOTAL))


async def test_a_stop_with_all_items_begun_is_bounded(tmp_path: Path) -> None:
    """The shard has fed all it has, and the fleet hangs: only the bound can end it."""

    async def act(item: Item) -> ItemState:
        if item.index == 9:
            tools.gate.close("SIGTERM")
        elif item.index % 2:
            await asyncio.Event().wait()
        return await answer(item)

    bench = Bench(tmp_path, act, streams=64, drain_s=0.05)
    async with bench.open() as tools:
        assert await bench.work(tools, 0, 10) is None
        recorded = [record["index"] for record in tools.item_journal.read_records()]
        assert tools.gate.in_flight == 0
    assert recorded == [0, 2, 4, 6, 8, 9]


async def test_a_stop_after_the_last_item_leaves_the_shard_finished(tmp_path: Path) -> None:
    async def act(item: Item) -> ItemState:
        state = await answer(item)
        if item.index == TOTAL - 1:
            tools.gate.close("SIGTERM")
        return state

    bench = Bench(tmp_path, act, streams=1)
    async with bench.open() as tools:
        part = await bench.work(tools)
        assert part is not None
        assert len(part) == TOTAL


async def test_a_failed_record_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(item: Item) -> ItemState:
        if item.index:
            await asyncio.Event().wait()
        return await answer(item)

    def put(_: dict[str, Any]) -> None:
        raise JournalError("disk full")

    bench = Bench(tmp_path, act)
    async with bench.open() as tools:
        monkeypatch.setattr(tools.item_journal, "put", put)
        with pytest.raises(JournalError, match="disk full"):
            await bench.work(tools)
        assert tools.gate.in_flight == 0
        assert tools.gate.is_closed


async def test_a_failed_record_in_a_cancelled_shard_is_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One full disk fails all shards, and LangGraph cancels the others when the first one fails."""
    begun, ending = asyncio.Event(), asyncio.Event()

    async def act(item: Item) -> ItemState:
        begun.set()
        await ending.wait()
        return await answer(item)

    def put(_: dict[str, Any]) -> None:
        raise JournalError("disk full")

    bench = Bench(tmp_path, act)
    async with bench.open() as tools:
        monkeypatch.setattr(tools.item_journal, "put", put)
        shard = asyncio.create_task(bench.work(tools))
        await begun.wait()
        shard.cancel()
        await asyncio.sleep(0)
        ending.set()
        with pytest.raises(asyncio.CancelledError) as caught:
            await shard
        assert isinstance(caught.value.__cause__, JournalError)
    del shard, caught
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_stage_that_cannot_count_stops_the_run(tmp_path: Path) -> None:
    async def act(item: Item) -> ItemState:
        await asyncio.sleep(0)
        return {"output": {"x": f"{item.index}"}}

    class Narrow:
        def __init__(self, stage: Any) -> None:
            self.stage = stage

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stage, name)

        def add(self, *_: Any) -> Any:
            raise ConfigurationError("histogram: too many values")

    bench = Bench(tmp_path, act)
    async with bench.open() as tools:
        object.__setattr__(tools, "aggregators", Narrow(tools.aggregators))
        assert await bench.work(tools) is None
        assert isinstance(tools.gate.error, ConfigurationError)
        assert sorted(bench.asked) == [
            record["index"] for record in tools.item_journal.read_records()
        ]


async def test_each_item_has_a_call_log_of_its_own(tmp_path: Path) -> None:
    logs, before = [], CURRENT_CALLS.get()

    async def act(item: Item) -> ItemState:
        log = CURRENT_CALLS.get()
        assert log is not None
        log.requests += item.index
        logs.append(log)
        return await answer(item)

    bench = Bench(tmp_path, act)
    async with bench.open() as tools:
        await bench.work(tools, 0, 20)
        assert [r["requests"] for r in tools.item_journal.read_records()] == list(range(20))
    assert CURRENT_CALLS.get() is before


class Steps(TypedDict, total=False):
    n: int


async def test_items_own_graphs_see_nothing_of_the_run(tmp_path: Path) -> None:
    """A graph run inside a node inherits the outer run's control, saver and durability."""

    async def step(state: Steps) -> Steps:
        control.request_drain("SIGTERM")
        return {"n": state["n"] + 1}

    inner = StateGraph(Steps)
    inner.add_sequence([("a", step), ("b", step), ("c", step)])
    inner.add_edge(START, "a")
    inner.add_edge("c", END)
    graph, control, saver = inner.compile(), RunControl(), InMemorySaver()

    async def act(_: Item) -> ItemState:
        configurable = (var_child_runnable_config.get() or {}).get("configurable", {})
        assert not any(isinstance(v, InMemorySaver) for v in configurable.values())
        return {"output": await graph.ainvoke({"n": 0})}

    bench = Bench(tmp_path, act, streams=2)

    async def node(_: Steps, runtime: Runtime[Any]) -> Steps:
        async with bench.open() as tools:
            drain = lambda: runtime.drain_reason if runtime.drain_requested else None  # noqa: E731
            assert await run_local_shard(Shard(0, 10), tools, drain) is None
            found = [(r["status"], r["output"]) for r in tools.item_journal.read_records()]
        assert found == [("done", {"n": 3})] * len(bench.asked)
        assert 0 < len(found) < 10
        return {"n": len(found)}

    outer: Any = StateGraph(Steps)
    outer.add_node("node", node)
    outer.add_edge(START, "node")
    outer.add_edge("node", END)
    config: Any = {"configurable": {"thread_id": "t"}}
    await outer.compile(checkpointer=saver).ainvoke(
        {"n": 0}, config, control=control, durability="sync"
    )
    spaces = {entry.config["configurable"]["checkpoint_ns"] for entry in saver.list(None)}
    assert spaces == {""}


@pytest.mark.parametrize("cut_off", [False, True])
async def test_a_cancelled_shard_lets_its_items_end(tmp_path: Path, cut_off: bool) -> None:
    """None begins any more, however often it is cancelled; a gate in a hurry cuts them off."""
    begun, ending = asyncio.Event(), asyncio.Event()

    async def act(item: Item) -> ItemState:
        begun.set()
        await ending.wait()
        return await answer(item)

    bench = Bench(tmp_path, act)
    async with bench.open() as tools:
        shard = asyncio.create_task(bench.work(tools))
        await begun.wait()
        for _ in range(3):
            shard.cancel()
            await asyncio.sleep(0)
            assert tools.gate.is_closed
            assert not shard.done()
        if cut_off:
            tools.gate.stop_waiting()
        else:
            ending.set()
        with pytest.raises(asyncio.CancelledError):
            await shard
        assert tools.gate.in_flight == 0
        assert len(list(tools.item_journal.read_records())) == (0 if cut_off else len(bench.asked))
        assert 0 < len(bench.asked) <= bench.streams
