"""A user's agents as item graphs: their cost is counted and their time is limited."""

from __future__ import annotations

import logging
import runpy
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from fanfold import ConfigurationError, build_graph
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec

pytestmark = pytest.mark.integration
EXAMPLES = Path(str(files("fanfold"))) / "examples"


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def settings(graph: str, **changes: Any) -> dict[str, Any]:
    fleet = {"nodes": 2, "responder": "agent", "time_scale": 1000}
    config = {
        "name": "agents",
        "input": {"dataset": "molecules", "id": "mol_id"},
        "task": {"prompt": "SMILES: {smiles}", "graph": f"agents:{graph}"},
        "endpoints": {"simulated": fleet},
        "reduce": [{"op": "count"}],
    }
    limits = {"hedge": False} | changes.pop("limits", {})
    return config | {"limits": limits} | changes


async def table_of(config: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    end = await build_graph(config).ainvoke({})
    return end, pq.read_table(end["results"]["table"]).to_pylist()


async def test_all_calls_of_an_agent_are_its_items() -> None:
    end, table = await table_of(settings("chemist"))
    assert end["progress"]["done"] == 20
    assert end["progress"]["requests"] == 60
    assert {row["attempts"] for row in table} == {3}  # two for the tools, one to answer
    tokens = end["progress"]["tokens"]
    assert sum(row["prompt_tokens"] for row in table) == tokens["prompt"] > 0
    assert sum(row["completion_tokens"] for row in table) == tokens["completion"] > 0
    assert all(row["output"] for row in table)


async def test_a_schema_does_not_keep_agents_from_their_tools() -> None:
    schema = {"type": "object"}
    config = settings("chemist")
    config["task"] |= {"schema": schema}
    end, table = await table_of(config)
    assert end["progress"]["requests"] == 60
    assert {row["error_class"] for row in table} == {"InvalidAnswerError"}  # the fleet's prose


async def test_steps_bound_a_runaway_agent() -> None:
    end, table = await table_of(settings("runaway", limits={"steps_per_item": 4}))
    assert end["aggregate"][0]["failed_by_class"] == {"TooManyStepsError": 20}
    assert {row["attempts"] for row in table} == {4}
    assert all("limits.steps_per_item (4)" in row["error"] for row in table)
    assert all(row["completion_tokens"] > 0 for row in table)  # what it cost is known


async def test_a_deadline_bounds_an_agent_that_waits_for_ever() -> None:
    end, table = await table_of(settings("stuck", limits={"item_timeout_s": 3}))
    failed = [row for row in table if row["status"] == "failed"]
    assert end["progress"]["failed"] == len(failed) == 7
    assert {row["error_class"] for row in failed} == {"ItemTimeoutError"}
    assert all("limits.item_timeout_s (3 s)" in row["error"] for row in failed)
    assert {row["attempts"] for row in failed} == {1}


async def test_the_deadline_holds_without_a_graph_of_ones_own() -> None:
    async with SimulatedFleet(SimulationSpec.fast(nodes=1)) as fleet:
        fleet.add_fault(FaultRule("hang", draw="item", p=0.3))
        config = settings("", limits={"item_timeout_s": 2, "hedge": False})
        config |= {"task": {"prompt": "{smiles}"}, "endpoints": {"urls": list(fleet.urls)}}
        end, _ = await table_of(config)
    count = end["aggregate"][0]
    assert 0 < count["failed"] < 20
    assert set(count["failed_by_class"]) == {"ItemTimeoutError"}


async def test_a_refused_call_of_an_agent_has_the_fleets_failure_class() -> None:
    async with SimulatedFleet(SimulationSpec.fast(nodes=1, responder="agent")) as fleet:
        fleet.add_fault(FaultRule("context", value=8))
        config = settings("chemist", endpoints={"urls": list(fleet.urls)})
        end, _ = await table_of(config)
    assert end["aggregate"][0]["failed_by_class"] == {"PromptTooLongError": 20}


async def test_a_ready_graph_brings_its_own_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    end, table = await table_of(settings("ready"))
    assert end["progress"]["requests"] == 0
    assert table[0]["output"].startswith("about ")
    assert [r.message for r in caplog.records].count(
        "task.graph: agents:ready uses its own model; fanfold does not count its calls"
    ) == 1


@pytest.mark.parametrize("cap", [{"usd": 5}, {"tokens": 1000}, {"requests": 10}])
async def test_a_ready_graph_cannot_be_held_to_a_budget(cap: dict[str, Any]) -> None:
    config = settings("ready", budget=cap)
    if "usd" in cap:
        config["model"] = {"price": {"prompt": 1, "completion": 1}}
    with pytest.raises(ConfigurationError, match="ready graph, whose model fanfold cannot hold"):
        await build_graph(config).ainvoke({})


@pytest.mark.parametrize(
    ("graph", "words"), [("uncompiled", "StateGraph must be compiled"), ("Talk", "not a graph")]
)
async def test_what_is_no_graph_is_said(graph: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        await build_graph(settings(graph)).ainvoke({})


async def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "react_agents.py"))
    end = await example["main"](60)
    assert end["progress"]["done"] == 60
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "60 agents done, 0 failed (simulated)"
    assert int(said[1].split()[0]) >= 180  # a slow one may have been sent twice


@pytest.mark.parametrize("graph", ["chemist", "streaming", "structured"])
async def test_a_budget_holds_for_all_calls_of_agents(graph: str) -> None:
    """By whichever door of the model an agent calls."""
    async with SimulatedFleet(SimulationSpec.fast(nodes=1, responder="agent")) as fleet:
        config = settings(graph, endpoints={"urls": list(fleet.urls)})
        config |= {"budget": {"requests": 13}, "shard": {"items": 5}}
        agents = build_graph(config, checkpointer=InMemorySaver(), trust_context=True)
        thread: RunnableConfig = {"configurable": {"thread_id": "t"}}
        end = await agents.ainvoke({}, thread)
        (pause,) = end["__interrupt__"]
        asked = fleet.stats()["totals"]["requests"]
        assert 0 < asked <= 13
        assert pause.value["budget"]["requests"]["spent"] == asked
        end = await agents.ainvoke(Command(resume={"requests": 500}), thread)
    assert end["progress"]["done"] == 20
