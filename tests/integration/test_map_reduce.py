"""The map-reduce graph as a library: items in, aggregate out, embedded or alone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict

from fanfold import ConfigurationError, RunContext, build_graph
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.storage.run_folder import open_folder
from fanfold.graphs.item import build_item_alone
from fanfold.graphs.map_reduce import build_bound_graph

pytestmark = pytest.mark.integration

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["score", "kind"],
    "properties": {
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "kind": {"type": "string", "enum": ["a", "b", "c"]},
    },
}


def settings(fleet: SimulatedFleet, **changes: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "task": {"system": "Judge.", "prompt": "What is {x}?", "schema": SCHEMA},
        "endpoints": {"urls": list(fleet.urls)},
        "limits": {"streams": 32, "hedge": False},
        "reduce": [
            {"op": "top_k", "field": "score", "k": 3, "show": ["x"]},
            {"op": "histogram", "field": "kind"},
            {"op": "stats", "field": "score"},
            {"op": "count"},
        ],
    } | changes


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"i{n}", "x": f"thing {n}"} for n in range(count)]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


async def test_items_in_aggregate_out(simulated: SimulatedFleet) -> None:
    end = await build_graph(settings(simulated)).ainvoke({"items": rows(300)})
    assert end["progress"]["items"] == end["progress"]["done"] == 300
    assert end["progress"]["simulated"] is True
    assert end["progress"]["requests"] == simulated.stats()["totals"]["requests"] == 300
    top, kinds, stats, count = end["aggregate"]
    assert [row["rank"] for row in top["rows"]] == [1, 2, 3]
    assert sum(entry["count"] for entry in kinds["counts"]) == stats["count"] == 300
    assert count["done"] == 300
    table: list[dict[str, Any]] = pq.read_table(end["results"]["table"]).to_pylist()
    assert [row["id"] for row in table] == [f"i{n}" for n in range(300)]
    assert all(row["simulated"] for row in table)
    best = max(table, key=lambda row: float(row["output"]["score"]))
    assert top["rows"][0]["id"] == best["id"]
    assert top["rows"][0]["show"] == {"x": f"thing {best['id'][1:]}"}
    assert set(end) == {"aggregate", "progress", "results"}


async def test_the_state_has_the_folder_and_the_aggregate_once(
    simulated: SimulatedFleet, tmp_path: Path
) -> None:
    """Rows of the results are in the run folder only, and the partial aggregate is dropped."""
    items = "".join(f'{{"id":"i{n}","x":"thing {n}","y":"needle"}}\n' for n in range(50))
    (tmp_path / "in.jsonl").write_text(items)
    thread: RunnableConfig = {"configurable": {"thread_id": "t"}}
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "s.sqlite")) as saver:
        graph = build_graph(settings(simulated), checkpointer=saver, trust_context=True)
        end = await graph.ainvoke({"path": "in.jsonl"}, thread)
        values = (await graph.aget_state(thread)).values
    table = pq.read_table(end["results"]["table"])
    assert table.column("y").to_pylist() == ["needle"] * 50
    assert values["aggregate"] == end["aggregate"]
    assert values["run"]["name"] == Path(end["results"]["folder"]).name
    assert values["parts"] == {}
    assert "results" not in values
    assert b"needle" not in (tmp_path / "s.sqlite").read_bytes()


async def test_an_embedded_run_notes_its_lives(simulated: SimulatedFleet) -> None:
    graph = build_graph(settings(simulated), trust_context=True)
    end = await graph.ainvoke({"items": rows(5)})
    folder = open_folder(Path(end["results"]["folder"]))
    for count in (1, 2):
        lives = folder.read_provenance()["sessions"]
        assert len(lives) == count
        last = lives[-1]
        assert last["outcome"] == "finished"
        assert last["started"] <= last["ended"]
        assert last["versions"]["fanfold"]
        await graph.ainvoke({}, context=RunContext(out=str(folder.path)))


async def test_a_path_in_place_of_the_configured_input(
    simulated: SimulatedFleet, tmp_path: Path
) -> None:
    (tmp_path / "things.csv").write_text("name,x\nA,1\nB,2\n")
    graph = build_graph(settings(simulated, input={"id": "name"}), trust_context=True)
    end = await graph.ainvoke({"path": "things.csv"})
    assert [r["id"] for r in pq.read_table(end["results"]["table"]).to_pylist()] == ["A", "B"]


@pytest.mark.parametrize("size", [1, 7, 64])
async def test_shards_of_any_size_give_the_same(simulated: SimulatedFleet, size: int) -> None:
    """One Send per item runs by the engine; larger shards walk; the results are equal."""
    faults = (
        FaultRule("bad_schema", p=0.2, draw="item", first_round=True),
        FaultRule("refusal", p=0.1, draw="item"),
    )
    for fault in faults:
        simulated.add_fault(fault)
    whole = await build_graph(settings(simulated)).ainvoke({"items": rows(100)})
    split = settings(simulated, shard={"items": size})
    end = await build_graph(split).ainvoke({"items": rows(100)})
    assert end["aggregate"] == whole["aggregate"]
    assert end["progress"] == whole["progress"]
    assert 0 < end["progress"]["failed"] < 50
    columns = ["id", "status", "output", "error_class", "repairs", "attempts", "prompt_tokens"]
    tables = [pq.read_table(e["results"]["table"], columns=columns) for e in (whole, end)]
    assert tables[0].equals(tables[1])
    assert set(tables[0]["repairs"].to_pylist()) == {0, 1}


async def test_failed_items_are_in_results_and_failures(simulated: SimulatedFleet) -> None:
    simulated.add_fault(FaultRule("bad_schema", p=0.3, draw="item"))
    end = await build_graph(settings(simulated)).ainvoke({"items": rows(60)})
    failures = [
        json.loads(line) for line in Path(end["results"]["failures"]).read_text().splitlines()
    ]
    assert len(failures) == end["progress"]["failed"] > 0
    assert {f["error_class"] for f in failures} == {"InvalidAnswerError"}
    assert all(f["output"] is None and "breaks the schema" in f["error"] for f in failures)
    table = pq.read_table(end["results"]["table"]).to_pylist()
    assert len(table) == 60
    count = end["aggregate"][-1]
    assert count["failed_by_class"] == {"InvalidAnswerError": len(failures)}


async def test_failed_items_are_asked_again_once(
    simulated: SimulatedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedded run is opened anew by each superstep; what failed again stays failed."""
    monkeypatch.setattr("fanfold.graphs.run.shard_plan._WINDOW", 3)
    simulated.add_fault(FaultRule("refusal", p=0.3, draw="item"))
    config = settings(simulated, shard={"items": 10})
    first = await build_graph(config).ainvoke({"items": rows(60)})
    failed = first["progress"]["failed"]
    assert failed > 0
    out = first["results"]["folder"]
    again = build_graph(RunContext(config=config, out=out, retry_failed=True))
    for n in (1, 2):
        end = await again.ainvoke({})
        assert end["progress"]["failed"] == failed
        assert len(pq.read_table(end["results"]["table"])) == 60
        assert len(Path(end["results"]["failures"]).read_text().splitlines()) == failed
        assert simulated.stats()["totals"]["requests"] == 60 + n * failed


async def test_state_and_checkpoints_do_not_grow_with_the_items(
    simulated: SimulatedFleet, tmp_path: Path
) -> None:
    sizes = []
    for count in (50, 2000):
        file = tmp_path / f"{count}.sqlite"
        async with AsyncSqliteSaver.from_conn_string(str(file)) as saver:
            graph = build_graph(settings(simulated, shard={"items": 2000}), checkpointer=saver)
            config: RunnableConfig = {"configurable": {"thread_id": "t"}}
            await graph.ainvoke({"items": rows(count)}, config)
            state = await graph.aget_state(config)
            assert "items" not in state.values
            # LangGraph itself keeps each invocation's input, once, as the checkpoint "input".
            query = (
                "SELECT max(length(checkpoint)) FROM checkpoints "
                "WHERE json_extract(metadata, '$.source') != 'input'"
            )
            async with saver.conn.execute(query) as c:
                row = await c.fetchone()
                assert row is not None
                sizes.append(row[0])
    assert sizes[1] < 1.5 * sizes[0]


async def test_a_thread_that_is_used_again_starts_anew(simulated: SimulatedFleet) -> None:
    graph = build_graph(settings(simulated), checkpointer=InMemorySaver())
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    first = await graph.ainvoke({"items": rows(20)}, config)
    second = await graph.ainvoke({"items": rows(30)}, config)
    assert first["progress"]["done"] == 20
    assert second["progress"]["done"] == 30
    assert second["aggregate"][2]["count"] == 30
    assert first["results"]["folder"] != second["results"]["folder"]


async def test_pasted_items_lost_with_the_process_are_not_replaced(
    simulated: SimulatedFleet,
) -> None:
    """No checkpoint keeps pasted items; a run resumed before they were written must not go on."""
    graph = build_bound_graph(
        RunContext(config=settings(simulated, input={"dataset": "molecules"}))
    ).compile(checkpointer=InMemorySaver(), interrupt_before=["load"])
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    await graph.ainvoke({"items": rows(5)}, config)
    with pytest.raises(ConfigurationError, match="start it again with the items"):
        await graph.ainvoke(None, config)
    assert simulated.stats()["totals"]["requests"] == 0


async def test_several_supersteps(simulated: SimulatedFleet, monkeypatch: Any) -> None:
    monkeypatch.setattr("fanfold.graphs.run.shard_plan._WINDOW", 3)
    whole = await build_graph(settings(simulated)).ainvoke({"items": rows(100)})
    small = settings(simulated, shard={"items": 10}, limits={"streams": 4, "hedge": False})
    end = await build_graph(small).ainvoke({"items": rows(100)})
    assert end["aggregate"] == whole["aggregate"]


class Parent(TypedDict, total=False):
    items: list[dict[str, Any]]
    aggregate: list[dict[str, Any]]
    progress: dict[str, Any]
    note: str


class ParentContext(TypedDict, total=False):
    config: str
    user: str


@pytest.mark.parametrize("context", [None, {"user": "me"}, {"config": "nonsense", "user": "me"}])
async def test_as_a_subgraph_the_bound_settings_count(
    simulated: SimulatedFleet, context: Any
) -> None:
    """The parent's context, of whatever shape, is not taken for fanfold's."""
    parent: Any = StateGraph(Parent, ParentContext)
    parent.add_node("screen", build_graph(settings(simulated)))
    parent.add_node("after", lambda _: {"note": "done"})
    parent.add_edge(START, "screen")
    parent.add_edge("screen", "after")
    parent.add_edge("after", END)
    graph = parent.compile(checkpointer=InMemorySaver())
    config: RunnableConfig = {"configurable": {"thread_id": "p"}}
    end = await graph.ainvoke({"items": rows(25)}, config, context=context)
    assert end["note"] == "done"
    assert end["progress"]["done"] == 25
    assert end["aggregate"][2]["count"] == 25


@pytest.mark.parametrize("kind", ["own", "mapping"])
async def test_a_context_of_fanfolds_own_overrides(simulated: SimulatedFleet, kind: str) -> None:
    other = settings(simulated, reduce=[{"op": "count"}])
    context: Any = RunContext(config=other) if kind == "own" else {"config": other}
    graph = build_graph(settings(simulated), trust_context=True)
    end = await graph.ainvoke({"items": rows(9)}, context=context)
    assert [stage["op"] for stage in end["aggregate"]] == ["count"]


async def test_errors_in_settings_show_when_the_graph_is_built(simulated: SimulatedFleet) -> None:
    with pytest.raises(ConfigurationError, match=r"unknown key 'limit'; did you mean 'limits'\?"):
        build_graph(settings(simulated, limit={}))


async def test_pasted_items_are_checked(simulated: SimulatedFleet, tmp_path: Path) -> None:
    graph = build_graph(settings(simulated))
    cases: list[tuple[Any, str]] = [
        ([], "items"),
        ([{"y": 1}], "x"),
        ([{"id": "a", "x": 1}, {"id": "a", "x": 2}], "'a'"),
        ([3], "items"),
    ]
    for items, words in cases:
        with pytest.raises(ConfigurationError, match=words):
            await graph.ainvoke({"items": items})
    assert not list((tmp_path / "fanfold-runs").glob("*"))
    assert simulated.stats()["totals"]["requests"] == 0


async def test_a_cancelled_run_drains_and_another_call_goes_on() -> None:
    """The second call has other settings, and comes while the first still waits for its items."""
    async with SimulatedFleet(SimulationSpec(nodes=1, jitter=0)) as slow:
        bound = settings(slow, limits={"streams": 64, "hedge": False})
        graph = build_graph(bound, checkpointer=InMemorySaver())
        config: RunnableConfig = {"configurable": {"thread_id": "t"}}
        context: Any = RunContext(streams=4)
        first = asyncio.create_task(graph.ainvoke({"items": rows(60)}, config, context=context))
        while not slow.stats()["totals"]["requests"]:  # noqa: ASYNC110 - a server's counts
            await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0)
        assert not first.done()
        end = await graph.ainvoke(None, config, context=RunContext(streams=64))
        with pytest.raises(asyncio.CancelledError):
            await first
        assert end["progress"]["done"] == slow.stats()["totals"]["requests"] == 60


async def test_a_cancelled_run_lets_workers_elsewhere_end_their_items() -> None:
    """By the fleet's counts nothing is requested twice; the next call requests the rest."""
    async with SimulatedFleet(SimulationSpec.fast(nodes=1, ttft_s=0.3)) as slow:
        changes: dict[str, Any] = {
            "backend": {"processes": 2},
            "shard": {"items": 20},
            "limits": {"streams": 8, "hedge": False},
        }
        graph = build_graph(settings(slow, **changes), checkpointer=InMemorySaver())
        config: RunnableConfig = {"configurable": {"thread_id": "t"}}
        first = asyncio.create_task(graph.ainvoke({"items": rows(120)}, config))
        while slow.stats()["totals"]["requests"] < 20:  # noqa: ASYNC110 - a server's counts
            await asyncio.sleep(0.01)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert slow.stats()["totals"]["requests"] < 120
        end = await graph.ainvoke(None, config)
        assert end["progress"]["done"] == slow.stats()["totals"]["requests"] == 120


async def test_progress_is_streamed_and_items_of_large_batches_are_not(
    simulated: SimulatedFleet,
) -> None:
    graph = build_graph(settings(simulated))
    for count, namespaces in ((4, 4), (201, 0)):
        seen, told = set[Any](), list[Any]()
        stream = graph.astream(
            {"items": rows(count)}, stream_mode=["custom", "updates"], subgraphs=True
        )
        async for namespace, mode, data in stream:
            if mode == "custom":
                told.append(data)
            elif namespace:
                seen.add(namespace)
        assert len(seen) == namespaces
        assert told[-1]["type"] == "progress"
        assert told[-1]["done"] == told[0]["items"] == count


def test_xray_shows_the_item_graph() -> None:
    nodes = set(build_graph().get_graph(xray=True).nodes)
    assert {"shard:prepare", "shard:infer", "shard:validate"} <= nodes
    assert {"load", "dispatch", "gather", "reduce"} <= nodes


async def test_the_item_graph_runs_by_itself(simulated: SimulatedFleet) -> None:
    graph = build_item_alone(RunContext(config=settings(simulated))).compile()
    end = await graph.ainvoke({"id": "a", "row": {"x": "a thing"}})
    assert set(end["output"]) == {"score", "kind"}


def echo_agent(model: Any) -> Any:
    """A user's item graph: two calls of the fleet, the second after the first."""

    async def call(given: dict[str, Any]) -> dict[str, Any]:
        first = await model.ainvoke(given["messages"])
        second = await model.ainvoke([*given["messages"], first, ("user", "again")])
        assert isinstance(second, AIMessage)
        return {"messages": [*given["messages"], first, second], "x": given["x"]}

    class State(TypedDict, total=False):
        messages: list[Any]
        x: str

    graph: Any = StateGraph(State)
    graph.add_node("call", call)
    graph.add_edge(START, "call")
    return graph.compile()


def broken_agent(model: Any) -> Any:  # noqa: ARG001 - the factory's form
    """A user's item graph that raises for every third item."""
    from langchain_core.runnables import RunnableLambda  # noqa: PLC0415 - as a user's module would

    async def call(given: dict[str, Any]) -> dict[str, Any]:
        if int(given["x"].split()[1]) % 3 == 0:
            msg = "my own bug"
            raise ZeroDivisionError(msg)
        return {"output": {"score": 0.5, "kind": "a"}}

    return RunnableLambda(call)


async def test_a_users_graph_is_the_item_graph(
    simulated: SimulatedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = settings(simulated)
    config["task"] = config["task"] | {"graph": "test_map_reduce:echo_agent"}
    end = await build_graph(config).ainvoke({"items": rows(40)})
    assert end["progress"]["done"] == 40
    assert end["progress"]["requests"] == 80  # both calls are the item's
    table = pq.read_table(end["results"]["table"]).to_pylist()
    assert {row["attempts"] for row in table} == {2}
    totals = end["progress"]["tokens"]
    assert sum(row["prompt_tokens"] for row in table) == totals["prompt"] > 0


async def test_a_users_bug_is_the_items_end(
    simulated: SimulatedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = settings(simulated)
    config["task"] = config["task"] | {"graph": "test_map_reduce:broken_agent"}
    end = await build_graph(config).ainvoke({"items": rows(30)})
    assert (end["progress"]["done"], end["progress"]["failed"]) == (20, 10)
    assert end["aggregate"][-1]["failed_by_class"] == {"ZeroDivisionError": 10}


@pytest.mark.parametrize(
    ("graph", "words"),
    [("nowhere.at.all:f", "cannot be imported"), ("json:nothing", "cannot be imported")],
)
async def test_a_users_graph_that_is_not_there(
    simulated: SimulatedFleet, graph: str, words: str
) -> None:
    config = settings(simulated)
    config["task"] = config["task"] | {"graph": graph}
    with pytest.raises(ConfigurationError, match=words):
        await build_graph(config).ainvoke({"items": rows(3)})
