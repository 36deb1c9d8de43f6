"""The map-reduce inside another graph, and called in every way that Python offers."""

from __future__ import annotations

import asyncio
import operator
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command
from typing_extensions import TypedDict

from fanfold import RunContext, build_graph
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.graphs.map_reduce import build_bound_graph

pytestmark = pytest.mark.integration

SCHEMA = {
    "type": "object",
    "required": ["score"],
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
}
ALONE: dict[str, Any] = {"simulated": {"nodes": 2, "time_scale": 1000}}
THREAD: RunnableConfig = {"configurable": {"thread_id": "t"}}


def settings(endpoints: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "test",
        "task": {"prompt": "What is {x}?", "schema": SCHEMA},
        "endpoints": endpoints,
        "limits": {"hedge": False},
        "shard": {"items": 10},
        "reduce": [{"op": "top_k", "field": "score", "k": 3}, {"op": "count"}],
    }


def rows(count: int) -> list[dict[str, Any]]:
    return [{"x": f"thing {n}"} for n in range(count)]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Sharing(TypedDict, total=False):
    """A parent that shares fanfold's keys, and has some that fanfold uses inside itself."""

    items: list[dict[str, Any]]
    aggregate: list[dict[str, Any]]
    results: dict[str, Any]
    total: str
    parts: Annotated[list[str], operator.add]
    cursor: str


class Mapping(TypedDict, total=False):
    """A parent whose keys mean something else, even where fanfold has one of that name."""

    molecules: list[str]
    items: int
    best: str


def node_itself(graph: Any) -> Any:
    parent: Any = StateGraph(Sharing)
    parent.add_node("screen", graph)
    parent.add_edge(START, "screen")
    parent.add_edge("screen", END)
    return parent


def node_function(graph: Any) -> Any:
    async def screen(state: Mapping) -> Mapping:
        end = await graph.ainvoke({"items": [{"x": m} for m in state["molecules"]]})
        best = end["aggregate"][0]["rows"][0]["id"]
        return {"items": end["progress"]["done"], "best": best}

    parent: Any = StateGraph(Mapping)
    parent.add_node("screen", screen)
    parent.add_edge(START, "screen")
    parent.add_edge("screen", END)
    return parent


async def test_as_a_node_it_touches_no_key_but_its_own(simulated: SimulatedFleet) -> None:
    graph = build_graph(settings({"urls": list(simulated.urls)}))
    parent = node_itself(graph).compile(checkpointer=InMemorySaver())
    given = {"items": rows(25), "total": "mine", "parts": ["mine"], "cursor": "mine"}
    end = await parent.ainvoke(given, THREAD)
    assert (end["total"], end["parts"], end["cursor"]) == ("mine", ["mine"], "mine")
    assert end["aggregate"][1]["done"] == 25
    assert set(end) == {"items", "aggregate", "results", "total", "parts", "cursor"}


async def test_in_a_node_function_the_mapping_is_the_callers(simulated: SimulatedFleet) -> None:
    graph = build_graph(settings({"urls": list(simulated.urls)}))
    parent = node_function(graph).compile(checkpointer=InMemorySaver())
    end = await parent.ainvoke({"molecules": list("abcdefg"), "items": 0}, THREAD)
    assert end["items"] == 7
    assert end["best"] in set("1234567")


@pytest.mark.parametrize("form", [node_itself, node_function])
async def test_its_steps_stream_through_the_parent(simulated: SimulatedFleet, form: Any) -> None:
    parent = form(build_graph(settings({"urls": list(simulated.urls)})))
    given = {"items": rows(25)} if form is node_itself else {"molecules": list("abc"), "items": 0}
    seen = [
        (bool(namespace), *update)
        async for namespace, update in parent.compile().astream(
            given, stream_mode="updates", subgraphs=True
        )
    ]
    inner = [name for inside, name in seen if inside]
    assert inner[:2] == ["load", "dispatch"]
    assert inner[-1] == "reduce"
    assert inner.count("shard") == (3 if form is node_itself else 1)
    assert [name for inside, name in seen if not inside] == ["screen"]


@pytest.mark.parametrize("form", [node_itself, node_function])
async def test_the_parents_saver_holds_its_steps(simulated: SimulatedFleet, form: Any) -> None:
    """A parent that is broken off within the subgraph goes on within it."""
    graph = build_graph(settings({"urls": list(simulated.urls)}))
    parent = form(graph).compile(checkpointer=InMemorySaver())
    given = {"items": rows(25)} if form is node_itself else {"molecules": list("abc"), "items": 0}
    steps = parent.astream(given, THREAD, stream_mode="updates", subgraphs=True, durability="sync")
    async with aclosing(steps):
        async for namespace, update in steps:
            if namespace and "gather" in update:
                break
    asked = simulated.stats()["totals"]["requests"]
    state = await parent.aget_state(THREAD, subgraphs=True)
    assert state.next == ("screen",)
    end = await parent.ainvoke(None, THREAD)
    assert (end["aggregate"][1]["done"] if form is node_itself else end["items"]) in {25, 3}
    assert simulated.stats()["totals"]["requests"] == asked
    assert len(list(Path("fanfold-runs").iterdir())) == 1


@pytest.mark.parametrize("form", [node_itself, node_function])
async def test_its_pause_reaches_the_parent(simulated: SimulatedFleet, form: Any) -> None:
    """The parent's caller allows more, and the run goes on within the parent."""
    config = settings({"urls": list(simulated.urls)}) | {"budget": {"requests": 12}}
    screen = build_graph(config, trust_context=True)
    parent = form(screen).compile(checkpointer=InMemorySaver())
    letters = [chr(ord("a") + n) for n in range(25)]
    given = {"items": rows(25)} if form is node_itself else {"molecules": letters, "items": 0}
    end = await parent.ainvoke(given, THREAD)
    (pause,) = end["__interrupt__"]
    assert pause.value["items"]["open"] > 12
    asked = simulated.stats()["totals"]["requests"]
    assert 0 < asked <= 12
    end = await parent.ainvoke(Command(resume={"requests": 99}), THREAD)
    assert (end["aggregate"][1]["done"] if form is node_itself else end["items"]) == 25
    assert simulated.stats()["totals"]["requests"] == 25
    assert len(list(Path("fanfold-runs").iterdir())) == 1


@pytest.mark.parametrize("form", [node_itself, node_function])
async def test_a_parent_addresses_its_answer(simulated: SimulatedFleet, form: Any) -> None:
    """A late answer to an earlier question, by its id or its number, changes and asks nothing."""
    config = settings({"urls": list(simulated.urls)}) | {"budget": {"requests": 6}}
    parent = form(build_graph(config, trust_context=True)).compile(checkpointer=InMemorySaver())
    letters = [chr(ord("a") + n) for n in range(25)]
    given = {"items": rows(25)} if form is node_itself else {"molecules": letters, "items": 0}

    async def answer(value: Any) -> Any:
        end = await parent.ainvoke(Command(resume=value), THREAD)
        return end["__interrupt__"][0] if "__interrupt__" in end else end

    def asked() -> int:
        return int(simulated.stats()["totals"]["requests"])

    (first,) = (await parent.ainvoke(given, THREAD))["__interrupt__"]
    spent = asked()
    assert 0 < spent <= 6
    assert first.value["number"] == 1
    second = await answer({first.id: {"requests": 2}})  # taken, and not enough: another question
    assert (second.value["number"], second.id == first.id) == (2, False)
    again = await answer({first.id: {"requests": 99}})
    assert (again.id, again.value["number"], asked()) == (second.id, 2, spent)
    assert again.value["budget"]["requests"]["cap"] == 2
    third = await answer({second.id: {"requests": 12, "number": 2}})
    assert third.value["number"] == 3
    assert third.value["budget"]["requests"]["cap"] == 12
    assert "problem" not in third.value
    assert spent < asked() <= 12
    spent = asked()
    fourth = await answer({"requests": 99, "number": 1})
    assert "names question 1, but question 3 is open" in fourth.value["problem"]
    assert (fourth.value["budget"]["requests"]["cap"], asked()) == (12, spent)
    end = await answer({fourth.id: {"requests": 99, "number": fourth.value["number"]}})
    assert (end["aggregate"][1]["done"] if form is node_itself else end["items"]) == 25
    assert asked() == 25


async def test_two_runs_ask_at_once_and_are_answered_by_id(simulated: SimulatedFleet) -> None:
    class Both(TypedDict, total=False):
        left: int
        right: int

    config = settings({"urls": list(simulated.urls)}) | {"budget": {"requests": 6}}
    graph = build_graph(config, trust_context=True)
    parent: Any = StateGraph(Both)

    def add(name: str, count: int) -> None:
        async def screen(state: Both) -> dict[str, Any]:  # noqa: ARG001 - a node
            return {name: (await graph.ainvoke({"items": rows(count)}))["progress"]["done"]}

        parent.add_node(f"{name}_screen", screen)
        parent.add_edge(START, f"{name}_screen")

    add("left", 10)
    add("right", 20)
    both = parent.compile(checkpointer=InMemorySaver())
    pauses = (await both.ainvoke({}, THREAD))["__interrupt__"]
    few, many = sorted(pauses, key=lambda pause: pause.value["items"]["open"])
    (still,) = (await both.ainvoke(Command(resume={few.id: {"requests": 99}}), THREAD))[
        "__interrupt__"
    ]
    assert still.id == many.id
    assert 10 < simulated.stats()["totals"]["requests"] <= 16
    end = await both.ainvoke(Command(resume={many.id: {"requests": 99}}), THREAD)
    assert (end["left"], end["right"]) == (10, 20)
    assert simulated.stats()["totals"]["requests"] == 30


def test_plain_code_invokes_it() -> None:
    """``invoke`` and ``stream`` need no running loop, and leave no thread behind."""
    graph = build_graph(settings(ALONE))
    end = graph.invoke({"items": rows(55)})
    assert end["progress"]["done"] == 55
    names = [name for update in graph.stream({"items": rows(15)}) for name in update]
    assert names == ["load", "dispatch", "shard", "shard", "gather", "reduce"]
    assert not [t for t in threading.enumerate() if t.name == "fanfold-aside"]


def test_a_plain_parent_with_a_plain_saver(tmp_path: Path) -> None:
    with SqliteSaver.from_conn_string(str(tmp_path / "plain.sqlite")) as saver:
        parent = node_itself(build_graph(settings(ALONE))).compile(checkpointer=saver)
        end = parent.invoke({"items": rows(12)}, THREAD)
        assert end["aggregate"][1]["done"] == 12
        assert parent.get_state(THREAD).values["results"]["simulated"] is True


def test_an_error_reaches_plain_code() -> None:
    graph = build_graph(settings(ALONE))
    with pytest.raises(Exception, match="column 'x'"):
        graph.invoke({"items": [{"y": 1}]})


async def test_plain_code_within_a_running_loop() -> None:
    """A notebook's cell runs in a loop; a plain call there blocks it and still ends."""
    end = build_graph(settings(ALONE)).invoke({"items": rows(12)})
    assert end["progress"]["done"] == 12


def test_one_after_another_in_loops_of_their_own() -> None:
    graph = build_graph(settings(ALONE))
    for count in (7, 8):
        end = asyncio.run(graph.ainvoke({"items": rows(count)}))
        assert end["progress"]["done"] == count
    assert graph.invoke({"items": rows(9)})["progress"]["done"] == 9


async def test_several_at_once_in_one_process(simulated: SimulatedFleet) -> None:
    shared = build_graph(settings({"urls": list(simulated.urls)}))
    other = build_graph(settings({"urls": list(simulated.urls)}))
    runs = [
        graph.ainvoke({"items": rows(n)}) for graph, n in ((shared, 21), (shared, 22), (other, 23))
    ]
    plain = asyncio.to_thread(lambda: shared.invoke({"items": rows(24)}))
    ends = await asyncio.gather(*runs, plain)
    assert [end["progress"]["done"] for end in ends] == [21, 22, 23, 24]
    assert len({end["results"]["folder"] for end in ends}) == 4


@pytest.mark.parametrize("durability", ["sync", "async"])
async def test_a_cancelled_run_leaves_its_database_usable(
    simulated: SimulatedFleet, tmp_path: Path, durability: Any
) -> None:
    """Its saver is still open; another one on the same file goes on and ends the run."""
    simulated.add_fault(FaultRule("slow", value=0.1))
    graph = build_bound_graph(RunContext(config=settings({"urls": list(simulated.urls)})))
    file = str(tmp_path / "run.sqlite")
    async with (
        AsyncSqliteSaver.from_conn_string(file) as first,
        AsyncSqliteSaver.from_conn_string(file) as second,
    ):
        cut = graph.compile(checkpointer=first)
        invoked = asyncio.ensure_future(
            cut.ainvoke({"items": rows(200)}, THREAD, durability=durability)
        )
        async with asyncio.timeout(60):
            while not simulated.stats()["totals"]["requests"]:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)
        invoked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await invoked
        end = await graph.compile(checkpointer=second).ainvoke(None, THREAD)
    assert end["progress"]["done"] == 200
