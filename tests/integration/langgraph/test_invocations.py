"""One invocation at a time uses a run, and every end of an invocation drains the run."""

from __future__ import annotations

import asyncio
import json
import operator
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pytest
import pytest_asyncio
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphDrained
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import RunControl
from langgraph.types import Command
from typing_extensions import TypedDict

from fanfold import FanfoldError, RunContext, build_graph
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.tests.support import command_server

pytestmark = pytest.mark.integration

SCHEMA = {
    "type": "object",
    "required": ["score"],
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
}
THREAD: RunnableConfig = {"configurable": {"thread_id": "t"}}
ITEMS, STREAMS = 60, 4
FAST = RunContext(streams=64)
BUSY = "another process or invocation is working on this run; wait for it or stop it"


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fanfold.nodes.shard.gate._POLL_S", 0.1)


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[SimulatedFleet]:
    """A fleet whose answers take some tenths of a second."""
    async with SimulatedFleet(SimulationSpec(nodes=1, jitter=0, time_scale=3)) as made:
        yield made


def settings(fleet: SimulatedFleet, **changes: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "task": {"prompt": "What is {x}?", "schema": SCHEMA},
        "endpoints": {"urls": list(fleet.urls)},
        "limits": {"hedge": False, "streams": STREAMS},
        "shard": {"items": 15},
        "reduce": [{"op": "count"}],
    } | changes


def rows(count: int = ITEMS) -> list[dict[str, Any]]:
    return [{"x": f"thing {n}"} for n in range(count)]


def asked(fleet: SimulatedFleet) -> int:
    return int(fleet.stats()["totals"]["requests"])


async def until(met: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not met():  # noqa: ASYNC110 - a server's counts
            await asyncio.sleep(0.01)


def the_folder() -> Path:
    (folder,) = Path("fanfold-runs").iterdir()
    return folder


# -- one at a time -----------------------------------------------------------------------

Second = Callable[[Any, SimulatedFleet], Coroutine[Any, Any, Any]]


async def same_thread(graph: Any, _: SimulatedFleet) -> Any:
    return await graph.ainvoke(None, THREAD)


async def new_items(graph: Any, _: SimulatedFleet) -> Any:
    return await graph.ainvoke({"items": rows()}, THREAD)


async def streamed(graph: Any, _: SimulatedFleet) -> Any:
    return [part async for part in graph.astream(None, THREAD, stream_mode="custom")]


async def other_thread(graph: Any, _: SimulatedFleet) -> Any:
    config: RunnableConfig = {"configurable": {"thread_id": "u"}}
    return await graph.ainvoke({}, config, context=RunContext(out=str(the_folder())))


async def other_graph(_: Any, fleet: SimulatedFleet) -> Any:
    spec = RunContext(config=settings(fleet), out=str(the_folder()))
    return await build_graph(spec, trust_context=True).ainvoke({})


async def other_spelling(graph: Any, _: SimulatedFleet) -> Any:
    Path("link").symlink_to(the_folder().absolute())
    config: RunnableConfig = {"configurable": {"thread_id": "u"}}
    return await graph.ainvoke({}, config, context=RunContext(out="./link/."))


async def in_a_thread(graph: Any, _: SimulatedFleet) -> Any:
    return await asyncio.to_thread(lambda: graph.invoke(None, THREAD))


async def in_a_loop(graph: Any, _: SimulatedFleet) -> Any:
    return await asyncio.to_thread(lambda: asyncio.run(graph.ainvoke(None, THREAD)))


async def travelled(graph: Any, _: SimulatedFleet) -> Any:
    history = [state async for state in graph.aget_state_history(THREAD)]
    (past,) = [state for state in history if state.next == ("dispatch",)]
    return await graph.ainvoke(None, past.config)


SECONDS: list[Second] = [
    *(same_thread, new_items, streamed, other_thread, other_graph, other_spelling),
    *(in_a_thread, in_a_loop, travelled),
]


@pytest.mark.parametrize("second", SECONDS)
async def test_a_second_invocation_is_refused_while_one_works(
    fleet: SimulatedFleet, second: Second
) -> None:
    graph = build_graph(settings(fleet), checkpointer=InMemorySaver(), trust_context=True)
    first = asyncio.create_task(graph.ainvoke({"items": rows()}, THREAD))
    await until(lambda: asked(fleet) >= STREAMS)
    with pytest.raises(FanfoldError, match=BUSY) as error:
        await second(graph, fleet)
    assert "multitask_strategy" in str(error.value)
    assert not first.done()
    end = await first
    assert end["progress"]["done"] == asked(fleet) == ITEMS
    again = await graph.ainvoke({}, THREAD, context=RunContext(out=str(the_folder())))
    assert again["progress"]["done"] == asked(fleet) == ITEMS


async def test_a_command_is_refused_while_an_embedded_run_works(fleet: SimulatedFleet) -> None:
    graph = build_graph(settings(fleet), trust_context=True)
    first = asyncio.create_task(graph.ainvoke({"items": rows(20_000)}))  # for a busy machine
    await until(lambda: asked(fleet) >= STREAMS)
    resume = command_server.Command(("resume", str(the_folder())))
    done = await command_server.get_command_server().run(resume)
    assert done.returncode == 2
    assert "wait for it or stop it" in " ".join(done.stderr.split())
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_two_plain_calls_at_once_are_one(fleet: SimulatedFleet) -> None:
    graph = build_graph(settings(fleet), checkpointer=InMemorySaver(), trust_context=True)
    start = threading.Barrier(2)

    def call() -> Any:
        start.wait()
        return graph.invoke({"items": rows()}, THREAD)

    with ThreadPoolExecutor(2) as pool:
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(pool, call) for _ in range(2)]
        ends = await asyncio.gather(*calls, return_exceptions=True)
    (refused,) = [end for end in ends if isinstance(end, BaseException)]
    assert BUSY in str(refused)
    assert asked(fleet) == ITEMS


async def test_a_pause_is_answered_once(fleet: SimulatedFleet) -> None:
    """The answer that is refused does not change the budget."""
    config = settings(fleet, budget={"requests": 10})
    graph = build_graph(config, checkpointer=InMemorySaver(), trust_context=True)
    end = await graph.ainvoke({"items": rows()}, THREAD)
    assert end["__interrupt__"]
    answers = [graph.ainvoke(Command(resume={"requests": n}), THREAD) for n in (500, 600)]
    ends = await asyncio.gather(*answers, return_exceptions=True)
    (refused,) = [end for end in ends if isinstance(end, BaseException)]
    assert BUSY in str(refused)
    assert asked(fleet) == ITEMS


async def test_invocations_of_different_runs_do_not_meet(fleet: SimulatedFleet) -> None:
    graph = build_graph(settings(fleet), checkpointer=InMemorySaver(), trust_context=True)
    threads: list[RunnableConfig] = [{"configurable": {"thread_id": n}} for n in "abc"]
    ends = await asyncio.gather(*(graph.ainvoke({"items": rows(8)}, t) for t in threads))
    assert [end["progress"]["done"] for end in ends] == [8, 8, 8]


# -- the next one is accepted ------------------------------------------------------------


@pytest.mark.parametrize("ended", ["finished", "failed", "cancelled", "drained", "paused"])
async def test_after_any_end_the_next_invocation_is_accepted(
    fleet: SimulatedFleet, ended: str
) -> None:
    budget = {"budget": {"requests": 10}} if ended == "paused" else {}
    graph = build_graph(settings(fleet, **budget), checkpointer=InMemorySaver(), trust_context=True)
    control = RunControl()
    limit: RunnableConfig = {"recursion_limit": 3} if ended == "failed" else {}
    first = asyncio.create_task(
        graph.ainvoke({"items": rows()}, {**THREAD, **limit}, control=control)
    )
    if ended in {"cancelled", "drained"}:
        await until(lambda: asked(fleet) >= STREAMS)
    if ended == "drained":
        control.request_drain("enough")
    if ended == "cancelled":
        first.cancel()  # nobody waits for it
    else:
        await asyncio.wait({first})
    given: Any = Command(resume={"requests": 99}) if ended == "paused" else None
    end = await graph.ainvoke(given, THREAD)
    assert end["progress"]["done"] == asked(fleet) == ITEMS
    kinds = {"failed": FanfoldError, "cancelled": asyncio.CancelledError, "drained": GraphDrained}
    if ended in kinds:
        with pytest.raises(kinds[ended]):
            await first


# -- however it ends, it is drained ------------------------------------------------------


class Shared(TypedDict, total=False):
    """A parent that shares what it gives and gets."""

    items: list[dict[str, Any]] | None
    progress: dict[str, Any]
    notes: Annotated[list[str], operator.add]


def passing(_: Shared) -> Shared:
    return {}


def beside(graph: Any, node: Any, saver: Any) -> Any:
    """Return a parent that runs the graph and a node at the same time."""
    parent: Any = StateGraph(Shared)
    for name, what in (("screen", graph), ("beside", node)):
        parent.add_node(name, what)
        parent.add_edge(START, name)
        parent.add_edge(name, END)
    return parent.compile(checkpointer=saver)


class Trouble:
    """A node that fails once some items are in flight."""

    def __init__(self, fleet: SimulatedFleet) -> None:
        self.fleet, self.on = fleet, True
        self.loop = asyncio.get_running_loop()

    async def waited(self, _: Shared) -> Shared:
        if self.on:
            await until(lambda: asked(self.fleet) >= STREAMS)
            raise ZeroDivisionError("beside")
        return {}

    def plain(self, _: Shared) -> Shared:
        if self.on:
            met = until(lambda: asked(self.fleet) >= STREAMS)
            asyncio.run_coroutine_threadsafe(met, self.loop).result()
            raise ZeroDivisionError("beside")
        return {}


async def drained(fleet: SimulatedFleet, bound: int = 5 * STREAMS) -> int:
    """Return how much was asked, after it has been seen that no more is."""
    await asyncio.sleep(0.5)
    before = asked(fleet)
    await asyncio.sleep(1)
    assert asked(fleet) == before < bound < ITEMS
    return before


@pytest.mark.parametrize("levels", [1, 2])
async def test_a_failing_node_beside_drains_the_run(fleet: SimulatedFleet, levels: int) -> None:
    trouble, graph = Trouble(fleet), build_graph(settings(fleet), trust_context=True)
    for level in range(levels):
        node = trouble.waited if level == levels - 1 else passing
        saver = InMemorySaver() if level == levels - 1 else None
        graph = beside(graph, node, saver)
    with pytest.raises(ZeroDivisionError):
        await graph.ainvoke({"items": rows()}, THREAD)
    await drained(fleet)
    trouble.on = False
    end = await graph.ainvoke(None, THREAD, context=FAST)
    assert end["progress"]["done"] == asked(fleet) == ITEMS


@pytest.mark.parametrize("levels", [1, 2])
async def test_a_failing_node_beside_drains_a_plain_run(fleet: SimulatedFleet, levels: int) -> None:
    trouble, graph = Trouble(fleet), build_graph(settings(fleet), trust_context=True)
    for level in range(levels):
        node = trouble.plain if level == levels - 1 else passing
        saver = InMemorySaver() if level == levels - 1 else None
        graph = beside(graph, node, saver)
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(lambda: graph.invoke({"items": rows()}, THREAD))
    await drained(fleet, 12 * STREAMS)
    trouble.on = False
    end = await asyncio.to_thread(lambda: graph.invoke(None, THREAD, context=FAST))
    assert end["progress"]["done"] == asked(fleet) == ITEMS


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "subgraph"])
@pytest.mark.parametrize("plain", [False, True], ids=["ainvoke", "invoke"])
async def test_a_steps_timeout_drains_the_run(
    fleet: SimulatedFleet, nested: bool, plain: bool
) -> None:
    graph: Any = build_graph(
        settings(fleet), checkpointer=None if nested else InMemorySaver(), trust_context=True
    )
    if nested:
        graph = beside(graph, passing, InMemorySaver())
    graph.step_timeout = 0.5
    given = {"items": rows()}
    call = asyncio.to_thread(graph.invoke, given, THREAD) if plain else graph.ainvoke(given, THREAD)
    with pytest.raises(TimeoutError):
        await call
    assert await drained(fleet, ITEMS - 1) > 0
    graph.step_timeout = None
    end = await graph.ainvoke(None, THREAD, context=FAST)
    assert end["progress"]["done"] == asked(fleet) == ITEMS


async def waited_for(graph: Any, _: SimulatedFleet) -> None:
    """Give up after a while."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(graph.ainvoke({"items": rows()}, THREAD), 0.6)


async def broken_off(graph: Any, fleet: SimulatedFleet) -> None:
    """Read no further; the stream is garbage."""
    async for _ in graph.astream({"items": rows()}, THREAD, stream_mode="custom"):
        await until(lambda: asked(fleet) >= STREAMS)
        break


async def left_open(graph: Any, fleet: SimulatedFleet) -> None:
    """Read no further; somebody still holds the stream."""
    stream = graph.astream({"items": rows()}, THREAD, stream_mode="updates", subgraphs=True)
    fleet.held = stream  # type: ignore[attr-defined]

    async def read() -> None:
        while asked(fleet) < STREAMS:
            await anext(stream)

    await asyncio.create_task(read())
    await asyncio.sleep(1)


async def abandoned_task(graph: Any, fleet: SimulatedFleet) -> None:
    """Cancel the task, and look no further."""
    task = asyncio.create_task(graph.ainvoke({"items": rows()}, THREAD))
    await until(lambda: asked(fleet) >= STREAMS)
    task.cancel()
    await asyncio.sleep(1.5)


async def closed_stream(graph: Any, fleet: SimulatedFleet) -> None:
    """Close the stream."""
    stream = graph.astream({"items": rows()}, THREAD, stream_mode="custom")
    await anext(stream)
    await until(lambda: asked(fleet) >= STREAMS)
    await stream.aclose()


async def loop_ended(graph: Any, fleet: SimulatedFleet) -> None:
    """Leave a loop in which a task still works."""

    async def main() -> None:
        fleet.held = asyncio.create_task(  # type: ignore[attr-defined]
            graph.ainvoke({"items": rows()}, THREAD)
        )
        await until(lambda: asked(fleet) >= STREAMS)

    await asyncio.to_thread(asyncio.run, main())


async def main_failed(graph: Any, fleet: SimulatedFleet) -> None:
    """Fail beside it, in a group of tasks."""

    async def fail() -> None:
        await until(lambda: asked(fleet) >= STREAMS)
        raise ZeroDivisionError("beside")

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(graph.ainvoke({"items": rows()}, THREAD))
            group.create_task(fail())

    with pytest.raises(ExceptionGroup):
        await asyncio.to_thread(asyncio.run, main())


ENDS = [
    *(waited_for, broken_off, left_open, abandoned_task, closed_stream, loop_ended, main_failed)
]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "processes"])
async def test_an_invocation_that_ends_early_is_drained(
    fleet: SimulatedFleet,
    end: Callable[[Any, SimulatedFleet], Coroutine[Any, Any, None]],
    elsewhere: bool,
) -> None:
    """What is in flight is finished; the next invocation asks for the rest, and nothing twice."""
    changes: dict[str, Any] = {"backend": {"processes": 1}} if elsewhere else {}
    graph = build_graph(
        settings(fleet, **changes), checkpointer=InMemorySaver(), trust_context=True
    )
    await end(graph, fleet)
    await drained(fleet, ITEMS - 1)
    found = await graph.ainvoke(None, THREAD, context=FAST)
    assert found["progress"]["done"] == asked(fleet) == ITEMS


async def test_cancelling_twice_cuts_off() -> None:
    """It ends long before its items would, and what was cut off is asked again."""
    async with SimulatedFleet(SimulationSpec(nodes=1, jitter=0, ttft_s=60, time_scale=1)) as slow:
        graph = build_graph(settings(slow), checkpointer=InMemorySaver(), trust_context=True)
        first = asyncio.create_task(graph.ainvoke({"items": rows()}, THREAD))
        await until(lambda: asked(slow) >= STREAMS)
        for _ in range(2):
            first.cancel()
            await asyncio.sleep(0.1)
        async with asyncio.timeout(10):
            with pytest.raises(asyncio.CancelledError):
                await first
        assert asked(slow) == STREAMS


SCRIPT = """
import asyncio, signal, sys
from fanfold import RunContext, build_graph

async def main():
    await graph.ainvoke(given)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    graph = build_graph(RunContext(config="c.yaml", out="run"))
    given = {"items": [{"x": f"thing {n}"} for n in range(60)]}
    if sys.argv[1] == "plain":
        graph.invoke(given)
    else:
        asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["plain", "plain single", "async"])
async def test_ctrl_c_drains_the_run(fleet: SimulatedFleet, kind: str, tmp_path: Path) -> None:
    size = 60 if kind == "plain single" else 15
    config = settings(fleet, shard={"items": size})
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    script = command_server.Command((kind.split(maxsplit=1)[0],), SCRIPT)
    process = await command_server.get_command_server().start(script)
    await until(lambda: asked(fleet) >= STREAMS)
    process.send_signal(signal.SIGINT)
    _, said = await process.communicate()
    assert process.returncode == -signal.SIGINT
    assert said.rstrip().endswith(b"KeyboardInterrupt")
    await drained(fleet, 12 * STREAMS)
    end = await build_graph(RunContext(config=config, out="run", streams=64)).ainvoke({})
    assert end["progress"]["done"] == asked(fleet) == ITEMS


DEAD = """
import asyncio
from pathlib import Path
from langgraph.checkpoint.memory import InMemorySaver
from fanfold import RunContext, build_graph

async def begun():
    files = lambda: Path("fanfold-runs").glob("*/journal/*.jsonl")
    while not any(b'"done"' in file.read_bytes() for file in files()):
        await asyncio.sleep(0.01)

graph = build_graph(RunContext(config="c.yaml"), checkpointer=InMemorySaver(), trust_context=True)
thread = {"configurable": {"thread_id": "t"}}
loop = asyncio.new_event_loop()
kept = loop.create_task(graph.ainvoke({"items": [{"x": f"{n}"} for n in range(60)]}, thread))
loop.run_until_complete(begun())
loop.close()
end = asyncio.run(graph.ainvoke(None, thread, context=RunContext(streams=64)))
print(end["progress"]["done"])
"""


async def test_a_dead_loop_holds_nobody_up(fleet: SimulatedFleet, tmp_path: Path) -> None:
    """Items that were in flight are lost with it, and asked again; no other item is."""
    (tmp_path / "c.yaml").write_text(json.dumps(settings(fleet)))
    script = command_server.Command((), DEAD)
    done = await command_server.get_command_server().run(script)
    assert done.stdout == f"{ITEMS}\n", done.stderr
    assert ITEMS <= asked(fleet) <= ITEMS + STREAMS
