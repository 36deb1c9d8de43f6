"""``as_tool``: what an agent is shown, what it may do, and what it may not do."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
import pyarrow.parquet as pq
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command
from pydantic import SecretStr

from fanfold import ConfigurationError, RunContext, as_tool
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.requests import Question
from fanfold.backends.simulated.responders import ToolCall
from fanfold.backends.simulated.spec import SimulationSpec

pytestmark = pytest.mark.integration

SCHEMA = {
    "type": "object",
    "required": ["score"],
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
}
ON_ITS_OWN: dict[str, Any] = {"endpoints": {"simulated": {"nodes": 2, "time_scale": 1000}}}


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "name": "solubility",
        "input": {"id": "mol_id", "smiles": "smiles"},
        "task": {"prompt": "How soluble is {smiles} at pH {p.H}?", "schema": SCHEMA},
        "limits": {"hedge": False},
        "reduce": [{"op": "top_k", "field": "score", "k": 8, "show": ["smiles"]}, {"op": "count"}],
    } | changes


def molecules(count: int) -> list[dict[str, Any]]:
    return [{"mol_id": f"m{n}", "smiles": "C" * (n + 1), "p.H": 7.4} for n in range(count)]


def call(tool: BaseTool, items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_call", "id": "c1", "name": tool.name, "args": {"items": items, **more}}


async def asked(tool: BaseTool, items: Any, **more: Any) -> ToolMessage:
    message = await tool.ainvoke(call(tool, items, **more))
    assert isinstance(message, ToolMessage)
    return message


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trial(simulated: SimulatedFleet, **options: Any) -> BaseTool:
    config = settings(endpoints={"urls": list(simulated.urls)})
    return as_tool(config, allow_simulated=True, **options)


def test_arguments_are_typed_by_the_tasks_columns() -> None:
    tool = as_tool(settings(**ON_ITS_OWN), allow_simulated=True, max_items=300)
    function = convert_to_openai_tool(tool)["function"]
    assert function["name"] == "solubility"
    assert "How soluble is {smiles}" in function["description"]
    assert "top_k of score" in function["description"]
    (items,) = function["parameters"]["properties"].values()
    assert (items["minItems"], items["maxItems"]) == (1, 300)
    row = items["items"]
    assert set(row["properties"]) == {"smiles", "p.H", "mol_id"}
    assert row["required"] == ["smiles", "p.H"]
    assert row["additionalProperties"] is False
    assert row["properties"]["smiles"]["type"] == "string"


async def test_the_aggregate_the_top_rows_and_a_reference(
    simulated: SimulatedFleet, tmp_path: Path
) -> None:
    tool = trial(simulated, rows=3, folder=tmp_path / "runs")
    message = await asked(tool, molecules(20))
    assert message.status == "success"
    said = json.loads(str(message.content))
    assert (said["items"], said["done"], said["failed"]) == (20, 20, 0)
    top, count = said["aggregate"]
    assert [row["rank"] for row in top["rows"]] == [1, 2, 3]
    assert top["more_rows"] == 5
    assert count["done"] == 20
    table: list[dict[str, Any]] = pq.read_table(said["results"]["table"]).to_pylist()
    best = max(table, key=lambda row: float(row["output"]["score"]))
    assert top["rows"][0]["id"] == best["id"]
    assert Path(said["results"]["folder"]).parent == tmp_path / "runs"
    assert said["simulated"] is True
    assert message.artifact["progress"]["requests"] == 20


async def test_without_a_ranking_the_first_answers_are_shown(simulated: SimulatedFleet) -> None:
    config = settings(endpoints={"urls": list(simulated.urls)}, reduce=[{"op": "count"}])
    said = json.loads(
        str((await asked(as_tool(config, rows=4, allow_simulated=True), molecules(9))).content)
    )
    assert [row["id"] for row in said["first"]] == ["m0", "m1", "m2", "m3"]
    assert all(0 <= row["output"]["score"] <= 1 for row in said["first"])


def test_a_plain_caller_gets_the_same() -> None:
    tool = as_tool(settings(**ON_ITS_OWN), allow_simulated=True)
    message = tool.invoke(call(tool, molecules(5)))
    assert json.loads(message.content)["done"] == 5


async def test_several_calls_at_once_have_runs_of_their_own(simulated: SimulatedFleet) -> None:
    tool = trial(simulated)
    messages = await asyncio.gather(*(asked(tool, molecules(n)) for n in (3, 4, 5)))
    said = [json.loads(str(m.content)) for m in messages]
    assert [s["done"] for s in said] == [3, 4, 5]
    assert len({s["results"]["folder"] for s in said}) == 3


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([{"smiles": "C"}], r"items\.0\.p\.H: Field required"),
        ([], "at least 1 item"),
        (molecules(31), "at most 30 items"),
        ([{"smiles": 3, "p.H": 7}], r"items\.0\.smiles: Input should be a valid string"),
        ([{"smiles": "C", "p.H": 7, "usd": 99}], r"items\.0\.usd: Extra inputs"),
        ("all of them", "items: Input should be a valid list"),
    ],
)
async def test_arguments_that_do_not_fit_are_told(
    simulated: SimulatedFleet, items: Any, words: str
) -> None:
    message = await asked(trial(simulated, max_items=30), items)
    assert message.status == "error"
    assert re.search(words, str(message.content))
    assert str(message.content).endswith("Correct them and call again.")
    assert simulated.stats()["totals"]["requests"] == 0


async def test_no_argument_raises_what_the_owner_allows(simulated: SimulatedFleet) -> None:
    tool = trial(simulated, max_items=10, max_items_in_all=12)
    for more in ({"max_items": 100}, {"budget": {"usd": 1000}}, {"allow_simulated": True}):
        message = await asked(tool, molecules(2), **more)
        assert message.status == "error"
        assert "Extra inputs" in str(message.content)
    assert (await asked(tool, molecules(10))).status == "success"
    message = await asked(tool, molecules(3))
    assert message.status == "error"
    assert "the 2 left of the 12 that this tool's owner allows" in str(message.content)
    assert (await asked(tool, molecules(2))).status == "success"
    assert "Report this to the user" in str((await asked(tool, molecules(1))).content)
    assert simulated.stats()["totals"]["requests"] == 12


async def test_input_that_was_refused_costs_nothing(simulated: SimulatedFleet) -> None:
    tool = trial(simulated, max_items_in_all=4)
    twins = [m | {"mol_id": "twin"} for m in molecules(4)]
    message = await asked(tool, twins)
    assert message.status == "error"
    assert "'twin'" in str(message.content)
    assert "correct the items and call again" in str(message.content)
    assert (await asked(tool, molecules(4))).status == "success"


async def test_failed_items_are_told_with_reasons(simulated: SimulatedFleet) -> None:
    simulated.add_fault(FaultRule("refusal", p=0.5, draw="item"))
    said = json.loads(str((await asked(trial(simulated), molecules(30))).content))
    assert said["done"] + said["failed"] == 30
    assert 0 < len(said["failures"]) <= 5
    assert all(f["error_class"] == "RefusedAnswerError" for f in said["failures"])


def test_a_simulated_fleet_must_be_allowed() -> None:
    with pytest.raises(ConfigurationError, match="allow_simulated=True"):
        as_tool(settings(**ON_ITS_OWN))
    with pytest.raises(ConfigurationError, match="allow_simulated=True"):
        as_tool("quickstart")


async def test_endpoints_that_turn_out_simulated_are_refused_unasked(
    simulated: SimulatedFleet, tmp_path: Path
) -> None:
    tool = as_tool(settings(endpoints={"urls": list(simulated.urls)}))
    message = await asked(tool, molecules(2))
    assert message.status == "error"
    assert "simulated fleet" in str(message.content)
    assert simulated.stats()["totals"]["requests"] == 0
    assert not list(tmp_path.rglob("items.arrow"))


async def test_dead_endpoints_are_the_users_business() -> None:
    tool = as_tool(settings(endpoints={"urls": ["http://127.0.0.1:9/v1"]}))
    message = await asked(tool, molecules(2))
    assert message.status == "error"
    assert "report it to the user" in str(message.content)


def test_a_context_is_taken_as_it_is() -> None:
    context = RunContext(config=settings(**ON_ITS_OWN), overrides=["input.limit=7"])
    tool = as_tool(context, allow_simulated=True, name="rank molecules!")
    assert tool.name == "rank_molecules_"
    assert tool.tool_call_schema.model_json_schema()["properties"]["items"]["maxItems"] == 7  # type: ignore[union-attr]


async def test_the_budget_holds_over_all_calls(simulated: SimulatedFleet) -> None:
    tool = as_tool(
        settings(endpoints={"urls": list(simulated.urls)}, budget={"requests": 14}),
        allow_simulated=True,
    )
    assert (await asked(tool, molecules(8))).status == "success"
    message = await asked(tool, molecules(8))
    assert message.status == "error"
    assert "the budget is exhausted" in str(message.content)
    assert "report this to the user" in str(message.content)
    spent = simulated.stats()["totals"]["requests"]
    assert 8 < spent <= 14
    for _ in range(3):
        assert (await asked(tool, molecules(8))).status == "error"
    assert simulated.stats()["totals"]["requests"] <= 14


async def test_two_calls_at_once_do_not_spend_the_budget_twice(simulated: SimulatedFleet) -> None:
    tool = as_tool(
        settings(endpoints={"urls": list(simulated.urls)}, budget={"requests": 20}),
        allow_simulated=True,
    )
    messages = await asyncio.gather(*(asked(tool, molecules(5)) for _ in range(3)))
    assert sorted(m.status for m in messages) == ["error", "error", "success"]
    assert sum("call again when it has ended" in str(m.content) for m in messages) == 2
    assert (await asked(tool, molecules(5))).status == "success"


def screening(question: Question) -> str | ToolCall:
    """Play a model: one call of the tool, then a sentence."""
    last = question.messages[-1]
    if last["role"] == "tool":
        return f"It says: {last['content'][:200]}"
    return ToolCall("solubility", {"items": molecules(20)})


@asynccontextmanager
async def brain() -> AsyncIterator[ChatOpenAI]:
    spec = SimulationSpec.fast(nodes=1, responder="script")
    async with (
        SimulatedFleet(spec, {"script": lambda _: screening}) as served,
        httpx2.AsyncClient() as http,
    ):
        yield ChatOpenAI(
            base_url=served.urls[0],
            api_key=SecretStr("-"),
            model=spec.model,
            http_async_client=http,
        )


async def test_an_agent_gets_the_result_and_goes_on(simulated: SimulatedFleet) -> None:
    async with brain() as model:
        agent: Any = create_agent(model, [trial(simulated)])
        end = await agent.ainvoke({"messages": [("user", "Screen them.")]})
    assert [m.type for m in end["messages"]] == ["human", "ai", "tool", "ai"]
    assert end["messages"][-1].content.startswith('It says: {"items":20,"done":20')


@pytest.mark.parametrize("saver", [None, InMemorySaver()])
async def test_one_message_may_call_it_several_times(
    simulated: SimulatedFleet, saver: InMemorySaver | None
) -> None:
    tool = trial(simulated)
    graph: Any = StateGraph(MessagesState)
    graph.add_node("tools", ToolNode([tool]))
    graph.add_edge(START, "tools")
    calls = [call(tool, molecules(n)) | {"id": f"c{n}"} for n in (2, 3, 4)]
    thread: RunnableConfig = {"configurable": {"thread_id": "t"}}
    message = AIMessage("", tool_calls=calls)
    end = await graph.compile(checkpointer=saver).ainvoke({"messages": [message]}, thread)
    assert [json.loads(m.content)["done"] for m in end["messages"][1:]] == [2, 3, 4]


async def test_an_exhausted_budget_interrupts_the_agent_if_the_owner_says_so(
    simulated: SimulatedFleet,
) -> None:
    """The human's answer raises it, and the run goes on where it was."""
    tool = as_tool(
        settings(endpoints={"urls": list(simulated.urls)}, budget={"requests": 8}),
        allow_simulated=True,
        interrupt=True,
        max_items_in_all=20,
    )
    thread: RunnableConfig = {"configurable": {"thread_id": "t"}}
    async with brain() as model:
        agent: Any = create_agent(model, [tool], checkpointer=InMemorySaver())
        end = await agent.ainvoke({"messages": [("user", "Screen them.")]}, thread)
        (pause,) = end["__interrupt__"]
        assert "the budget is exhausted" in pause.value["question"]
        assert simulated.stats()["totals"]["requests"] <= 8
        end = await agent.ainvoke(Command(resume={"requests": 100}), thread)
    assert end["messages"][-1].content.startswith('It says: {"items":20,"done":20')
    assert simulated.stats()["totals"]["requests"] == 20
    assert len(list(Path("fanfold-runs").iterdir())) == 1


async def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(files("fanfold") / "examples" / "as_tool.py"))
    assert (await example["main"](30)).startswith("The most soluble is ")
    assert capsys.readouterr().out.startswith("screen_solubility: 30 molecules")
