"""A pipeline as a graph with one node for each stage: picture, run, pause for the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from fanfold import ConfigurationError, RunContext, build_graph
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.graphs.map_reduce import build_bound_graph

pytestmark = pytest.mark.integration

SCORE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["score"],
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
}
ITEMS = [{"id": f"i{n}", "x": f"thing {n}"} for n in range(12)]


def settings(urls: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "input": {"dataset": "abstracts"},
        "endpoints": {"urls": urls},
        "model": {"max_tokens": 2000},
        "stages": [
            {"name": "screen", "map": {"prompt": "What is {x}?", "schema": SCORE}},
            {
                "name": "summary",
                "where": "output.score > 0.1",
                "reduce": {"op": "summarize", "prompt": "Sum", "text": "{x}", "group_tokens": 100},
            },
        ],
    } | changes


def test_the_picture_has_one_node_for_each_stage() -> None:
    graph = build_graph(settings(["http://127.0.0.1:9"]))
    picture = graph.get_graph()
    assert set(picture.nodes) == {"__start__", "load", "screen", "summary", "__end__"}
    assert [(e.source, e.target) for e in picture.edges][1:] == [
        ("load", "screen"),
        ("screen", "summary"),
        ("summary", "__end__"),
    ]
    assert "summary" in graph.get_graph(xray=True).draw_mermaid()


async def test_a_pipeline_runs_in_its_graph_and_names_the_stage(tmp_path: Path) -> None:
    async with SimulatedFleet(SimulationSpec.fast(nodes=2)) as fleet:
        context = RunContext(config=settings(list(fleet.urls)), out=str(tmp_path / "run"))
        graph: Any = build_graph(context)
        stages = set[str]()
        end: dict[str, Any] = {}
        async for _, mode, part in graph.astream(
            {"items": ITEMS}, stream_mode=["custom", "values"], subgraphs=True
        ):
            if mode == "custom":
                stages.add(part["stage"])
            elif "stage" in part:
                end = part
        assert end["stage"] == "summary"
        assert end["progress"]["stage"] == "summary"
        (row,) = pq.read_table(end["results"]["table"]).to_pylist()
        assert row["output"]["items"] > 0
        assert stages == {"screen", "summary"}
        again = await build_graph(context).ainvoke({})
        assert again["results"] == end["results"]
        counted = sum(node["requests"] for node in fleet.stats()["nodes"])
        for found in (end["progress"], again["progress"]):  # of the results, and of all levels
            assert (found["items"], found["done"], found["failed"]) == (1, 1, 0)
            assert found["requests"] == counted - len(ITEMS)
        assert counted == len(fleet.stats(prompts=True)["prompts"])


async def test_the_budget_is_raised_in_the_second_stage(tmp_path: Path) -> None:
    async with SimulatedFleet(SimulationSpec.fast(nodes=2)) as fleet:
        budget = {"requests": len(ITEMS) + 1, "reserve_for_reduce": {}}
        given = settings(list(fleet.urls), budget=budget)
        given["stages"][1]["reduce"]["text"] = "{x}" + " and more about it" * 12
        context = RunContext(config=given, out=str(tmp_path / "run"))
        graph = build_graph(context, checkpointer=InMemorySaver(), trust_context=True)
        thread: Any = {"configurable": {"thread_id": "a"}}
        paused = await graph.ainvoke({"items": ITEMS}, thread)
        (question,) = paused["__interrupt__"]
        assert "13 requests" in question.value["question"]
        state = await graph.aget_state(thread)
        assert state.next == ("summary",)
        end = await graph.ainvoke(Command(resume={"requests": 200}), thread)
        assert end["progress"]["stage"] == "summary"
        rows = pq.read_table(end["results"]["table"]).to_pylist()
        assert rows[0]["output"]["failed"] == []


async def test_the_generic_graph_loops_over_the_stages(tmp_path: Path) -> None:
    async with SimulatedFleet(SimulationSpec.fast(nodes=2)) as fleet:
        graph: Any = build_bound_graph(trust_context=True).compile()
        context = {"config": settings(list(fleet.urls)), "out": str(tmp_path / "run")}
        stages = list[str]()
        end: dict[str, Any] = {}
        async for mode, part in graph.astream(
            {"items": ITEMS}, context=context, stream_mode=["updates", "values"]
        ):
            if mode == "updates" and "stages" in part:
                stages.append(part["stages"]["progress"]["stage"])
            elif mode == "values":
                end = part
        assert stages == ["screen", "summary"]
        (row,) = pq.read_table(end["results"]["table"]).to_pylist()
        assert row["output"]["items"] > 0


async def test_other_stages_than_those_of_the_graph_are_refused(tmp_path: Path) -> None:
    given = settings(["http://127.0.0.1:9"])
    context = RunContext(config=given, out=str(tmp_path / "run"))
    graph: Any = build_graph(context, trust_context=True)
    with pytest.raises(ConfigurationError, match="stages"):
        await graph.ainvoke({"preset": "data_annotation"})
    with pytest.raises(ConfigurationError, match="first node"):
        build_graph(given | {"stages": [{"name": "load", "map": {"prompt": "{x}"}}]})
