"""The real ``langgraph dev``, driven by LangGraph's client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from langgraph_sdk import get_client
from langgraph_sdk.client import LangGraphClient

from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.tests.integration.dev_server import Server

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("langgraph-dev")]


@pytest_asyncio.fixture
async def client(dev_server: Server) -> AsyncIterator[LangGraphClient]:
    async with get_client(url=dev_server.url) as one:
        yield one


def molecules(count: int) -> Any:  # the client knows its own types of input only
    return [{"id": f"m{n}", "smiles": "C" * (n % 9 + 1) + "O"} for n in range(count)]


def at(fleet: SimulatedFleet, **more: Any) -> dict[str, Any]:
    """What a scientist fills in to ask these endpoints."""
    return {"endpoints": ",".join(fleet.urls), **more}


async def streamed(
    client: LangGraphClient, thread: str, given: dict[str, Any] | None, **more: Any
) -> list[tuple[str, Any]]:
    stream = client.runs.stream(
        thread,
        "map_reduce",
        input=given,
        stream_mode=["custom", "updates"],
        stream_subgraphs=True,
        **more,
    )
    return [(part.event, part.data) async for part in stream]


async def new_thread(client: LangGraphClient) -> str:
    return str((await client.threads.create())["thread_id"])


async def test_graphs_picture_and_schemas(client: LangGraphClient) -> None:
    found = {a["graph_id"]: a for a in await client.assistants.search()}
    assert set(found) == {"map_reduce", "item"}
    assert all(a["description"] for a in found.values())

    ident = found["map_reduce"]["assistant_id"]
    drawn = await client.assistants.get_graph(ident, xray=True)
    nodes = {node["id"]: node for node in drawn["nodes"]}
    items = {"shard:prepare", "shard:infer", "shard:validate"}
    assert items | {"load", "dispatch", "gather", "reduce"} <= nodes.keys()
    assert all(n["metadata"]["description"] for name, n in nodes.items() if not name.endswith("__"))

    alone = await client.assistants.get_schemas(found["item"]["assistant_id"])
    assert (alone["input_schema"] or {})["properties"].keys() == {"id", "row"}
    schemas = await client.assistants.get_schemas(ident)
    given = (schemas["input_schema"] or {})["properties"]
    assert {"items", "path", "preset"} <= given.keys()
    form = (schemas["context_schema"] or {})["properties"]
    assert all(field["description"] and "default" in field for field in form.values())
    assert (form["streams"]["minimum"], form["streams"]["default"]) == (1, 256)
    assert "literature_mining" in form["preset"]["enum"]
    assert form["endpoints"]["default"] == ""  # the owner of this server opened it
    assert not form.keys() & {"graph", "backend", "backend_options", "node", "out", "cache"}
    assert (schemas["config_schema"] or {})["properties"].keys() == form.keys()


async def test_a_small_batch_is_seen_item_by_item(
    client: LangGraphClient, dev_server: Server, simulated: SimulatedFleet
) -> None:
    thread = await new_thread(client)
    context = at(simulated, streams=8, reduce=[{"op": "count"}], api_key="${FLEET_KEY}")
    parts = await streamed(client, thread, {"items": molecules(3)}, context=context)
    steps = [(e, name) for e, d in parts if e.startswith("updates|shard:") for name in d]
    assert len({event for event, _ in steps}) == 3
    assert sorted(name for _, name in steps) == ["infer"] * 3 + ["prepare"] * 3 + ["validate"] * 3
    told = [data for event, data in parts if event == "custom"]
    assert told[-1]["type"] == "progress"
    assert (told[-1]["items"], told[-1]["done"], told[-1]["failed"]) == (3, 3, 0)
    assert told[-1]["tokens"]["completion"] > 0

    state = await client.threads.get_state(thread)
    assert isinstance(state["values"], dict)
    assert [stage["op"] for stage in state["values"]["aggregate"]] == ["count"]
    assert str(dev_server.folder) not in json.dumps(state["values"])
    runs, name = dev_server.folder / "fanfold-runs", state["values"]["run"]["name"]
    (told_at,) = [d["reduce"]["results"] for _, d in parts if "reduce" in (d or ())]
    assert Path(told_at["folder"]) == runs / name
    settings = (runs / name / "run.yaml").read_text()
    assert "streams: 8" in settings
    assert "sesame" not in settings


async def test_a_large_batch_runs_in_shards(
    client: LangGraphClient, simulated: SimulatedFleet
) -> None:
    given = {"items": molecules(300)}
    parts = await streamed(client, await new_thread(client), given, context=at(simulated))
    assert not [event for event, _ in parts if event.startswith("updates|")]
    told = [data for event, data in parts if event == "custom"]
    assert told[0]["items"] == told[-1]["done"] == 300


async def test_the_input_may_name_a_preset(client: LangGraphClient) -> None:
    given: Any = {"preset": "data_annotation"}
    context: Any = {"limit": 2}
    end: Any = await client.runs.wait(None, "map_reduce", input=given, context=context)
    assert Path(end["results"]["folder"]).name.startswith("data-annotation-")
    assert end["progress"]["done"] == 2
    assert end["progress"]["simulated"] is True


async def test_the_item_graph_runs_by_itself(
    client: LangGraphClient, simulated: SimulatedFleet
) -> None:
    one: Any = {"id": "aspirin", "row": {"smiles": "CC(=O)Oc1ccccc1C(=O)O"}}
    end: Any = await client.runs.wait(None, "item", input=one, context=at(simulated))
    assert end["output"]["solubility_class"] in {"poor", "moderate", "good"}


async def test_what_is_wrong_is_said(client: LangGraphClient) -> None:
    thread = await new_thread(client)
    cases = [({"streams": 0}, "limits.streams"), ({"api_key": "sk-secret"}, "name a variable")]
    for wrong, text in cases:
        parts = await streamed(client, thread, {"items": molecules(1)}, context=wrong)
        (error,) = [data for event, data in parts if event == "error"]
        assert error["error"] == "ConfigurationError"
        assert text in error["message"]
        assert "sk-secret" not in error["message"]


async def test_cancelling_drains_and_the_run_goes_on(client: LangGraphClient) -> None:
    """What was asked is answered, journalled and never asked again."""
    count = 150
    async with SimulatedFleet(SimulationSpec(nodes=1, responder="schema", jitter=0)) as slow:
        thread, context = await new_thread(client), at(slow, streams=4, hedge=False)
        stream = client.runs.stream(
            thread,
            "map_reduce",
            input={"items": molecules(count)},
            context=context,
            stream_mode="custom",
        )
        run, done = "", 0
        async for part in stream:
            run = part.data["run_id"] if part.event == "metadata" else run
            done = part.data["done"] if part.event == "custom" else done
            if done:
                break
        await client.runs.cancel(thread, run, wait=True)
        assert (await client.runs.get(thread, run))["status"] == "interrupted"
        asked = slow.stats()["totals"]["requests"]
        assert done <= asked < count
        state = await client.threads.get_state(thread)
        assert "shard" in state["next"]

        context = {"streams": 64}  # on top of what the run has
        end: Any = await client.runs.wait(thread, "map_reduce", input=None, context=context)
        assert end["progress"]["done"] == count
        assert slow.stats()["totals"]["requests"] == count


async def test_a_spent_budget_asks_and_the_answer_goes_on(
    client: LangGraphClient, simulated: SimulatedFleet
) -> None:
    thread, context = await new_thread(client), at(simulated, requests=5)
    parts = await streamed(client, thread, {"items": molecules(12)}, context=context)
    (asked,) = [d["__interrupt__"] for _, d in parts if "__interrupt__" in d]
    assert asked[0]["value"]["budget"]["requests"]["cap"] == 5
    assert "usd" in asked[0]["response_schema"]["properties"]
    assert 0 < simulated.stats()["totals"]["requests"] <= 5
    assert (await client.threads.get(thread))["status"] == "interrupted"

    async def answer(answer: Any) -> Any:
        resume: Any = {"resume": answer}
        return await client.runs.wait(thread, "map_reduce", command=resume, context=context)

    again = await answer("go on")
    assert "new totals" in json.dumps(again["__interrupt__"])
    (open_,) = again["__interrupt__"]
    assert (asked[0]["value"]["number"], open_["value"]["number"]) == (1, 2)
    with pytest.raises(Exception, match="no open question"):
        await answer({asked[0]["id"]: {"requests": 100}})
    late = await answer({"requests": 100, "number": 1})
    assert "names question 1, but question 2 is open" in json.dumps(late["__interrupt__"])
    assert simulated.stats()["totals"]["requests"] <= 5
    (open_,) = late["__interrupt__"]
    end = await answer({open_["id"]: {"requests": 100, "number": open_["value"]["number"]}})
    assert end["progress"]["done"] == 12
    assert simulated.stats()["totals"]["requests"] == 12


async def test_history_time_travel_and_restart(
    dev_server: Server, client: LangGraphClient, simulated: SimulatedFleet
) -> None:
    thread, context = await new_thread(client), at(simulated)
    first = await client.runs.wait(
        thread, "map_reduce", input={"items": molecules(5)}, context=context
    )
    history = await client.threads.get_history(thread)
    steps = [state["next"] for state in history]
    assert steps[0] == []
    assert steps[-2:0:-1] == [["load"], ["dispatch"], ["shard"] * 5, ["gather"], ["reduce"]]
    asked = simulated.stats()["totals"]["requests"]

    for again in ("dispatch", "reduce"):  # the journal answers: nobody is asked twice
        (point,) = [state["checkpoint"] for state in history if state["next"] == [again]]
        end = await client.runs.wait(thread, "map_reduce", checkpoint=point)
        assert end == first  # also without the settings, which the run's folder has
    assert simulated.stats()["totals"]["requests"] == asked

    dev_server.stop()
    assert "BlockingError" not in dev_server.log.read_text()
    dev_server.start()
    async with get_client(url=dev_server.url) as fresh:
        kept = await fresh.threads.get_state(thread)
        end = await fresh.runs.wait(
            thread, "map_reduce", input={"items": molecules(7)}, context=context
        )
    assert isinstance(first, dict)
    assert isinstance(kept["values"], dict)
    assert kept["values"]["aggregate"] == first["aggregate"]
    assert isinstance(end, dict)
    assert end["progress"]["done"] == 7
