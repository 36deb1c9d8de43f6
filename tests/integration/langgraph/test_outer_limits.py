"""Limits of a caller or a parent graph do not change the result of an item."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command
from typing_extensions import TypedDict

from fanfold import FanfoldError, RunContext, as_tool, build_graph
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.graphs.map_reduce import build_bound_graph

pytestmark = pytest.mark.integration

SCHEMA = {
    "type": "object",
    "required": ["score"],
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
}
COLUMNS = ["id", "status", "output", "error_class", "error", "repairs", "attempts"]
ROWS = [{"smiles": "C" * n} for n in range(1, 25)]
THREAD: RunnableConfig = {"configurable": {"thread_id": "t"}}


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def settings(fleet: SimulatedFleet, graph: str | None = None, **changes: Any) -> dict[str, Any]:
    task: dict[str, Any] = {"prompt": "What is {smiles}?", "schema": SCHEMA, "repairs": 4}
    if graph is not None:
        task = {"prompt": "What is {smiles}?", "graph": f"agents:{graph}"}
    return {
        "name": "test",
        "task": task,
        "endpoints": {"urls": list(fleet.urls)},
        "limits": {"hedge": False},
        "reduce": [{"op": "count"}],
    } | changes


def table(end: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(end["results"]["table"], columns=COLUMNS).to_pylist()
    return rows


def journal(folder: Path) -> list[dict[str, Any]]:
    """Return every record of an item, of whichever session."""
    lines = [line for f in folder.glob("journal/*.jsonl") for line in f.read_bytes().splitlines()]
    return [record for line in lines if "index" in (record := json.loads(line))]


OUTER: dict[str, dict[str, Any]] = {
    "limit 8": {"config": {"recursion_limit": 8}},
    "limit 25": {"config": {"recursion_limit": 25}},
    "limit 10000": {"config": {"recursion_limit": 10_000}},
    "one at a time": {"config": {"max_concurrency": 1}},
    "hidden": {"config": {"tags": ["langsmith:hidden", "nostream"]}},
    "metadata": {"config": {"metadata": {"model": "another", "seed": 3}}},
    "configurable": {"config": {"configurable": {"thread_id": "t", "model": "x", "user": "me"}}},
    "exit": {"durability": "exit"},
    "async": {"durability": "async"},
    "sync": {"durability": "sync"},
}


@pytest.mark.parametrize("singly", [True, False], ids=["engine", "walk"])
async def test_items_end_the_same_under_every_invocation(
    simulated: SimulatedFleet, singly: bool
) -> None:
    """Many answers break the schema; an item that fails took eleven steps."""
    simulated.add_fault(FaultRule("bad_schema", p=0.8, draw="item"))
    shard = {"items": 1 if singly else 8}
    found = {}
    for name, outer in {"nothing": {}, **OUTER}.items():
        graph = build_graph(settings(simulated, shard=shard), checkpointer=InMemorySaver())
        config: Any = {**THREAD, **outer.get("config", {})}
        durability: Any = outer.get("durability")
        end = await graph.ainvoke({"items": ROWS}, config, durability=durability)
        found[name] = table(end)
    assert all(rows == found["nothing"] for rows in found.values())
    assert {row["error_class"] for row in found["nothing"]} == {None, "InvalidAnswerError"}
    assert {row["repairs"] for row in found["nothing"]} == set(range(5))


@pytest.mark.parametrize("outer", [{"recursion_limit": 8}, {"max_concurrency": 1}], ids=str)
@pytest.mark.parametrize("graph", ["patient", "tasked"])
@pytest.mark.parametrize("shard", [1, 8])
async def test_a_users_graph_has_its_own_limits(
    simulated: SimulatedFleet, outer: RunnableConfig, graph: str, shard: int
) -> None:
    run = build_graph(settings(simulated, graph, shard={"items": shard}))
    async with asyncio.timeout(60):  # a task that waits for its graph's place would wait for ever
        end = await run.ainvoke({"items": ROWS}, outer)
    assert end["progress"]["done"] == len(ROWS)


@pytest.mark.parametrize("shard", [1, 8])
async def test_a_users_graph_sees_nothing_of_the_invocation(
    simulated: SimulatedFleet, shard: int
) -> None:
    graph = build_bound_graph(
        RunContext(config=settings(simulated, "nosy", shard={"items": shard}))
    )
    compiled = graph.compile(checkpointer=InMemorySaver())
    config: RunnableConfig = {
        "configurable": {"thread_id": "t", "user": "me"},
        "recursion_limit": 77,
        "max_concurrency": 3,
        "tags": ["mine"],
    }
    end = await compiled.ainvoke({"items": ROWS[:3]}, config, durability="sync")
    for row in table(end):
        assert row["error"] is None
        found = ast.literal_eval(row["output"])
        assert found == {
            "limit": None,
            "concurrency": None,
            "durability": None,
            "tags": [],
            "context": None,
            "store": InMemoryStore.__name__,  # its own
            "drain": False,
            "keys": [],
        }


ENDS = {
    "asking": ("ItemGraphError", "task.graph paused at interrupt()"),
    "deserter": ("ItemGraphError", "Command.PARENT"),
    "drained": ("ItemGraphError", "by itself"),
    "clashing": ("InvalidUpdateError", "'n'"),
    "cancelling": ("CancelledError", "by itself"),
}


@pytest.mark.parametrize("graph", ENDS)
@pytest.mark.parametrize("changes", [{"shard": {"items": 1}}, {"shard": {"items": 8}}], ids=str)
async def test_what_a_users_graph_raises_ends_its_item(
    simulated: SimulatedFleet, graph: str, changes: dict[str, Any]
) -> None:
    """An error of LangGraph's that is the item's own, by the engine and without it."""
    end = await build_graph(settings(simulated, graph, **changes)).ainvoke({"items": ROWS})
    name, text = ENDS[graph]
    assert end["aggregate"][0]["failed_by_class"] == {name: len(ROWS)}
    assert all(text in row["error"] for row in table(end))


async def test_an_interrupt_ends_an_item_elsewhere_too(
    simulated: SimulatedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    config = settings(simulated, "asking", backend={"processes": 1})
    end = await build_graph(config).ainvoke({"items": ROWS[:4]})
    assert end["aggregate"][0]["failed_by_class"] == {"ItemGraphError": 4}


@pytest.mark.parametrize("shard", [1, 8])
async def test_the_answer_to_the_runs_pause_is_no_answer_to_an_item(
    simulated: SimulatedFleet, shard: int
) -> None:
    changes: dict[str, Any] = {"budget": {"requests": 10}, "shard": {"items": shard}}
    bound = settings(simulated, "asking", **changes)
    graph = build_graph(bound, checkpointer=InMemorySaver(), trust_context=True)
    end = await graph.ainvoke({"items": ROWS}, THREAD)
    assert end["__interrupt__"]
    end = await graph.ainvoke(Command(resume={"requests": 99}), THREAD)
    assert end["aggregate"][0]["failed_by_class"] == {"ItemGraphError": len(ROWS)}
    assert simulated.stats()["totals"]["requests"] == len(ROWS)


class Parent(TypedDict, total=False):
    """A parent that shares what it gives and gets."""

    items: list[dict[str, Any]]
    progress: dict[str, Any]
    results: dict[str, Any]


def inside(graph: Any, saver: Any) -> Any:
    parent: Any = StateGraph(Parent)
    parent.add_node("screen", graph)
    parent.add_edge(START, "screen")
    parent.add_edge("screen", END)
    return parent.compile(checkpointer=saver)


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "subgraph"])
@pytest.mark.parametrize(("limit", "windows"), [(2, 1), (3, 1), (5, 1), (8, 3), (14, 4)])
async def test_a_limit_below_the_runs_own_steps_asks_for_more_before_anything_is_asked(
    simulated: SimulatedFleet,
    monkeypatch: pytest.MonkeyPatch,
    nested: bool,
    limit: int,
    windows: int,
) -> None:
    monkeypatch.setattr("fanfold.graphs.run.shard_plan._WINDOW", 1)
    monkeypatch.setattr("fanfold.graphs.run.shard_plan._MOST", 1)
    config = settings(simulated, shard={"items": -(-len(ROWS) // windows)})
    saver = InMemorySaver()
    graph = (
        inside(build_graph(config), saver) if nested else build_graph(config, checkpointer=saver)
    )
    with pytest.raises(FanfoldError, match=r"raise recursion_limit to \d+") as error:
        await graph.ainvoke({"items": ROWS}, {**THREAD, "recursion_limit": limit})
    assert simulated.stats()["totals"]["requests"] == 0
    (folder,) = Path("fanfold-runs").iterdir()
    assert journal(folder) == []
    enough = int(re.findall(r"raise recursion_limit to (\d+)", str(error.value))[0])
    end = await graph.ainvoke(None, {**THREAD, "recursion_limit": enough})
    assert end["progress"]["done"] == simulated.stats()["totals"]["requests"] == len(ROWS)


async def test_the_limit_that_is_asked_for_is_the_least_that_is_enough(
    simulated: SimulatedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fanfold.graphs.run.shard_plan._WINDOW", 1)
    monkeypatch.setattr("fanfold.graphs.run.shard_plan._MOST", 1)
    graph = build_graph(settings(simulated, shard={"items": 6}))
    with pytest.raises(FanfoldError, match="raise recursion_limit to") as error:
        await graph.ainvoke({"items": ROWS}, {"recursion_limit": 3})
    enough = int(re.findall(r"raise recursion_limit to (\d+)", str(error.value))[0])
    with pytest.raises(FanfoldError, match=f"raise recursion_limit to {enough}"):
        await graph.ainvoke({"items": ROWS}, {"recursion_limit": enough - 1})
    end = await graph.ainvoke({"items": ROWS}, {"recursion_limit": enough})
    assert end["progress"]["done"] == len(ROWS)


@pytest.mark.parametrize("plain", [False, True], ids=["ainvoke", "invoke"])
async def test_an_agents_limit_is_not_its_tools(simulated: SimulatedFleet, plain: bool) -> None:
    config = settings(simulated)
    config["task"] = {"prompt": "What is {smiles}?", "schema": SCHEMA}
    tool = as_tool(config, allow_simulated=True)
    call = {"name": tool.name, "args": {"items": ROWS}, "id": "1", "type": "tool_call"}
    outer: RunnableConfig = {"recursion_limit": 3}
    if plain:
        message = await asyncio.to_thread(tool.invoke, call, outer)
    else:
        message = await tool.ainvoke(call, outer)
    assert message.status == "success"
    assert message.artifact["progress"]["done"] == len(ROWS)


def test_the_command_line_has_no_such_limit(tmp_path: Path) -> None:
    """Not even where the environment says so."""
    arguments = ["run", "quickstart", "--out", "out", "--limit", "9", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "fanfold", *arguments, "--set", "shard.items=1"],
        cwd=tmp_path,
        env={**os.environ, "LANGGRAPH_DEFAULT_RECURSION_LIMIT": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["done"] == 9


class Seen(BaseCallbackHandler):
    """Counts the nodes of items that a callback sees."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_chain_start(self, *_: Any, name: str | None = None, **__: Any) -> None:
        self.names.append(name or "")


async def test_callbacks_still_see_items(simulated: SimulatedFleet) -> None:
    seen = Seen()
    graph = build_graph(settings(simulated, shard={"items": 1}))
    await graph.ainvoke({"items": ROWS[:5]}, {"callbacks": [seen], "recursion_limit": 8})
    assert [seen.names.count(name) for name in ("prepare", "infer", "validate")] == [5, 5, 5]


async def test_traced_items_of_one_shard_stream_apart(simulated: SimulatedFleet) -> None:
    """Each item of a shard has a namespace of its own."""
    context = RunContext(config=settings(simulated, shard={"items": 5}), trace=True)
    stream = build_graph(context).astream(
        {"items": ROWS[:5]}, stream_mode="updates", subgraphs=True
    )
    spaces = [space for space, update in [part async for part in stream] if "infer" in update]
    assert len(spaces) == len(set(spaces)) == 5
