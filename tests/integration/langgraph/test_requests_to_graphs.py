"""Input and context of an invocation: wrong ones start nothing, closed settings stay closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, Send
from typing_extensions import TypedDict

from fanfold import ConfigurationError, RunContext, as_tool, build_graph
from fanfold.backends.core.errors import InputError
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.graphs.item import build_item_alone
from fanfold.tests.integration.test_map_reduce import rows, settings

pytestmark = pytest.mark.integration
THREAD: RunnableConfig = {"configurable": {"thread_id": "t"}}

UNINTENDED: list[tuple[Any, str]] = [
    ({"itemss": rows(2)}, "did you mean 'items'"),
    ({"Items": rows(2)}, "unknown key 'Items'"),
    ({"items": rows(2), "limit": 1}, "unknown key 'limit'"),
    ({"input": {"items": rows(2)}}, "unknown key 'input'"),
    ({"path": ""}, "path: is empty"),
    ({"path": None}, "path is null"),
    ({"path": 5}, "name a file or a folder as text"),
    ({"items": None}, "items is null"),
    ({"items": None, "path": None, "preset": None}, "is null"),
    ({"items": []}, "items is empty"),
    ({"items": {"x": 1}}, "give a list of mappings"),
    ({"items": "x"}, "give a list of mappings"),
    ({"items": rows(2), "path": "things.csv"}, "not both"),
    ({"items": rows(2), "path": ""}, "not both"),
    ({"preset": ""}, "preset: is empty"),
    ({"preset": 3}, "name a preset as text"),
    ([], "give a mapping"),
    ("things.csv", "give a mapping"),
    (rows(2), "give a mapping"),
]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "things.csv").write_text("x\n1\n2\n3\n")


@pytest_asyncio.fixture
async def slow() -> AsyncIterator[SimulatedFleet]:
    async with SimulatedFleet(SimulationSpec(nodes=1, jitter=0)) as one:
        yield one


def with_input(fleet: SimulatedFleet, **changes: Any) -> dict[str, Any]:
    """Settings that have a batch of their own, which must not start unasked."""
    return settings(fleet, input={"path": str(Path("things.csv").resolve())}, **changes)


def asked(fleet: SimulatedFleet) -> int:
    return int(fleet.stats()["totals"]["requests"])


def assert_nothing_began(fleet: SimulatedFleet) -> None:
    assert asked(fleet) == 0
    assert not Path("fanfold-runs").exists()


# -- unintended input ---------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(("given", "words"), UNINTENDED)
async def test_unintended_input_starts_nothing(
    simulated: SimulatedFleet, given: Any, words: str, trust: bool
) -> None:
    graph: Any = build_graph(with_input(simulated), trust_context=trust)
    with pytest.raises(InputError, match=words):
        await graph.ainvoke(given)
    with pytest.raises(InputError, match=words):
        await asyncio.to_thread(graph.invoke, given)
    with pytest.raises(InputError, match=words):
        async for _ in graph.astream(given, stream_mode="updates"):
            pass
    with pytest.raises(InputError, match=words):
        async for _ in graph.astream_events(given, version="v2"):
            pass
    graph = build_graph(with_input(simulated), checkpointer=InMemorySaver())
    with pytest.raises(InputError, match=words):
        await graph.ainvoke(given, THREAD)
    assert_nothing_began(simulated)


@pytest.mark.parametrize("given", [{}, None])
@pytest.mark.parametrize("saver", [None, InMemorySaver])
async def test_nothing_at_all_runs_the_bound_input(
    simulated: SimulatedFleet, given: Any, saver: Any
) -> None:
    graph: Any = build_graph(with_input(simulated), checkpointer=saver and saver())
    assert (await graph.ainvoke(given, THREAD))["progress"]["done"] == 3
    assert (await asyncio.to_thread(graph.invoke, given or {}, THREAD))["progress"]["done"] == 3


async def test_none_goes_on_where_something_was_begun(slow: SimulatedFleet) -> None:
    graph: Any = build_graph(with_input(slow), checkpointer=InMemorySaver())
    first = asyncio.create_task(graph.ainvoke({"items": rows(60)}, THREAD))
    while not asked(slow):  # noqa: ASYNC110 - a server's counts
        await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await graph.ainvoke(None, THREAD))["progress"]["done"] == 60
    assert asked(slow) == 60


async def test_no_input_and_none_bound_is_an_error(simulated: SimulatedFleet) -> None:
    graph: Any = build_graph(settings(simulated))
    with pytest.raises(ConfigurationError, match=r"input\.path"):
        await graph.ainvoke({})
    with pytest.raises(ConfigurationError, match=r"input\.path"):
        await graph.ainvoke(None)


class Parent(TypedDict, total=False):
    items: list[dict[str, Any]] | None
    path: str | None
    molecules: list[str]
    itemz: int
    progress: dict[str, Any]


def below(graph: Any) -> Any:
    parent = StateGraph(Parent)
    parent.add_node("screen", graph)
    parent.add_edge(START, "screen")
    parent.add_edge("screen", END)
    return parent.compile()


async def test_the_keys_of_a_parent_are_the_parents(simulated: SimulatedFleet) -> None:
    """As a node the graph is handed all of the parent's state."""
    parent = below(build_graph(with_input(simulated)))
    state: dict[str, Any] = {"molecules": ["C"], "itemz": 3}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"path": ""}, "is empty"),
        ({"items": None}, "is null"),
        ({"items": []}, "is empty"),
    ]
    for given, count in (({"items": rows(2), "path": None} | state, 2), (state, 3)):
        assert (await parent.ainvoke(given))["progress"]["done"] == count
    before = asked(simulated)
    for given, words in wrong:
        with pytest.raises(InputError, match=words):
            await parent.ainvoke(given | state)
    assert asked(simulated) == before


async def test_what_a_node_function_hands_over_is_its_own(simulated: SimulatedFleet) -> None:
    graph: Any = build_graph(with_input(simulated))

    async def misspelt(state: Parent) -> Any:
        return {"progress": (await graph.ainvoke({"itemss": state["items"]}))["progress"]}

    async def its_state(state: Any, config: RunnableConfig) -> Any:
        return {"progress": (await graph.ainvoke(state, config))["progress"]}

    async def wrong_context(state: Parent) -> Any:
        context: Any = {"streamz": 1}
        return await graph.ainvoke({"items": state["items"] or []}, context=context)

    given = {"items": rows(2), "molecules": ["C"]}
    with pytest.raises(InputError, match="did you mean 'items'"):
        await below(misspelt).ainvoke(given)
    with pytest.raises(ConfigurationError, match="did you mean 'streams'"):
        await below(wrong_context).ainvoke(given)
    assert_nothing_began(simulated)
    assert (await below(its_state).ainvoke(given))["progress"]["done"] == 2


async def test_what_is_sent_to_the_graph_is_its_own(simulated: SimulatedFleet) -> None:
    parent: Any = StateGraph(Parent)
    parent.add_node("screen", build_graph(with_input(simulated)))
    parent.add_conditional_edges(START, lambda _: [Send("screen", {"itemss": rows(2)})], ["screen"])
    parent.add_edge("screen", END)
    with pytest.raises(InputError, match="did you mean 'items'"):
        await parent.compile().ainvoke({"molecules": []})
    assert_nothing_began(simulated)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"id": "a"},
        {"row": {"x": 1}},
        {"id": "a", "rows": {"x": 1}},
        {"id": "a", "row": {"x": 1}, "messages": []},
        {"id": "a", "row": "x"},
        {"id": 1, "row": {}},
        [],
    ],
)
async def test_the_item_graph_takes_an_item(simulated: SimulatedFleet, given: Any) -> None:
    graph: Any = build_item_alone(RunContext(config=settings(simulated))).compile()
    with pytest.raises(InputError):
        await graph.ainvoke(given)
    assert asked(simulated) == 0


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("context", [{"streamz": 1}, {"streams": 2, "user": "me"}, {"Preset": "x"}])
async def test_an_unknown_key_of_the_context_starts_nothing(
    simulated: SimulatedFleet, context: Any, trust: bool
) -> None:
    graph: Any = build_graph(with_input(simulated), trust_context=trust)
    with pytest.raises(ConfigurationError, match="unknown key"):
        await graph.ainvoke({}, context=context)
    with pytest.raises(ConfigurationError, match="unknown key"):
        await asyncio.to_thread(lambda: graph.invoke({}, context=context))
    assert_nothing_began(simulated)


# -- what an invocation may set -------------------------------------------------------------------


def attacks(marker: Path) -> list[dict[str, Any]]:
    touch = f"touch {marker}"
    first = {"base_url": "http://127.0.0.1:9", "paths": ["a/b"], "token_command": touch}
    return [
        {"endpoint_options": {"first": first}},
        {"node": {"serve": touch}},
        {"backend": "launched", "backend_options": {"command": touch}},
        {"overrides": ["backend={kind: executor, factory: 'os:abort'}"]},
        {"config": {"task": {"prompt": "{x}", "graph": "os:abort"}}},
        {"out": str(marker)},
        {"cache": str(marker)},
    ]


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("form", ["mapping", "own", "below a parent", "the item graph"])
async def test_no_context_runs_a_command(
    simulated: SimulatedFleet, tmp_path: Path, form: str, number: int
) -> None:
    marker = tmp_path / "marker"
    fields = attacks(marker)[number]
    graph: Any = build_graph(with_input(simulated))
    given: Any = {"items": rows(2)}
    context: Any = fields if form == "mapping" else RunContext(**fields)
    if form == "below a parent":
        graph = below(graph)
    elif form == "the item graph":
        graph = build_item_alone(RunContext(config=settings(simulated))).compile()
        given = {"id": "a", "row": {"x": "thing"}}
    with pytest.raises(ConfigurationError, match="FANFOLD_SERVER_ALLOW"):
        await graph.ainvoke(given, context=context)
    assert not marker.exists()
    assert_nothing_began(simulated)


async def test_paths_need_a_root(
    simulated: SimulatedFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "link.csv").symlink_to(tmp_path / "things.csv")
    (tmp_path / "shared" / "${HOME}.csv").write_text("x\n1\n")
    with pytest.raises(InputError, match="FANFOLD_SERVER_ROOT"):
        await build_graph(settings(simulated)).ainvoke({"path": "things.csv"})
    monkeypatch.setenv("FANFOLD_SERVER_ROOT", str(tmp_path / "shared"))
    graph: Any = build_graph(settings(simulated))
    for path in ("../things.csv", str(tmp_path / "things.csv"), "link.csv", "/etc/passwd"):
        with pytest.raises(InputError, match="outside the folder"):
            await graph.ainvoke({"path": path})
    assert_nothing_began(simulated)
    assert (await graph.ainvoke({"path": "${HOME}.csv"}))["progress"]["done"] == 1
    trusting: Any = build_graph(settings(simulated), trust_context=True)
    assert (await trusting.ainvoke({"path": "things.csv"}))["progress"]["done"] == 3


async def test_items_that_are_requests_are_requests_of_the_caller(
    simulated: SimulatedFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound file may set any field of the body; what an invocation gives may not."""

    def line(**fields: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, **fields}
        return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}

    (tmp_path / "shared").mkdir()
    for file in (tmp_path / "bound.jsonl", tmp_path / "shared" / "given.jsonl"):
        file.write_text(json.dumps(line(priority=-1)))
    monkeypatch.setenv("FANFOLD_SERVER_ROOT", str(tmp_path / "shared"))
    config = settings(simulated, input={"path": "bound.jsonl", "format": "openai_batch"})
    config = {key: config[key] for key in ("input", "endpoints", "limits")}
    graph: Any = build_graph(config)
    given: list[Any] = [{"items": [line(priority=-1)]}, {"path": "given.jsonl"}]
    for one in given:
        with pytest.raises(ConfigurationError, match=r"may not set model\.extra_body\.priority"):
            await graph.ainvoke(one)
    context: Any = {"overrides": ["input.path=given.jsonl"]}
    with pytest.raises(ConfigurationError, match=r"may not set model\.extra_body\.priority"):
        await graph.ainvoke({}, context=context)
    assert_nothing_began(simulated)
    for fine in ({"items": [line(top_k=3)]}, {}):
        assert (await graph.ainvoke(fine))["progress"]["done"] == 1
    trusting: Any = build_graph(config, trust_context=True)
    assert (await trusting.ainvoke(given[0]))["progress"]["done"] == 1


async def test_the_owner_opens_keys(
    simulated: SimulatedFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FANFOLD_SERVER_ALLOW", "out,limits.streams")
    graph: Any = build_graph(settings(simulated))
    context: Any = {"out": str(tmp_path / "mine"), "streams": 1000}
    end = await graph.ainvoke({"items": rows(2)}, context=context)
    assert end["results"]["folder"] == str(tmp_path / "mine")
    assert "streams: 1000" in (tmp_path / "mine" / "run.yaml").read_text()
    closed: Any = {"backend": "launched"}
    with pytest.raises(ConfigurationError, match=r"backend\.kind"):
        await graph.ainvoke({"items": rows(2)}, context=closed)


async def test_a_runs_request_holds_for_its_next_invocation(slow: SimulatedFleet) -> None:
    """What a request asked for is the run's, and goes upon what is bound now."""
    saver = InMemorySaver()
    bound = settings(slow, limits={"streams": 64, "hedge": False})
    graph: Any = build_graph(bound, checkpointer=saver)
    context: Any = {"prompt": "Why {x}?", "reduce": [{"op": "count"}], "streams": 4}
    first = asyncio.create_task(graph.ainvoke({"items": rows(40)}, THREAD, context=context))
    while not asked(slow):  # noqa: ASYNC110 - a server's counts
        await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    other: Any = {"prompt": "Who {x}?"}
    with pytest.raises(ConfigurationError, match="differ from those of this run"):
        await build_graph(bound, checkpointer=saver).ainvoke(None, THREAD, context=other)
    again: Any = build_graph(
        bound | {"limits": {"streams": 32, "hedge": False}}, checkpointer=saver
    )
    end = await again.ainvoke(None, THREAD, context=RunContext(streams=16))
    assert [stage["op"] for stage in end["aggregate"]] == ["count"]
    assert end["progress"]["done"] == asked(slow) == 40


async def test_an_answer_raises_a_budget_to_the_bound_one(simulated: SimulatedFleet) -> None:
    small: dict[str, Any] = {"limits": {"streams": 2}, "shard": {"items": 5}}
    bound = settings(simulated, budget={"requests": 40}, **small)
    graph: Any = build_graph(bound, checkpointer=InMemorySaver())
    context: Any = {"requests": 10}
    end = await graph.ainvoke({"items": rows(60)}, THREAD, context=context)
    assert "Answer with a higher total" in end["__interrupt__"][0].value["question"]
    end = await graph.ainvoke(Command(resume={"requests": 10**6}), THREAD, context=context)
    (pause,) = end["__interrupt__"]
    assert "at most 40" in pause.value["problem"]
    assert asked(simulated) <= 10
    end = await graph.ainvoke(Command(resume={"requests": 40}), THREAD, context=context)
    (pause,) = end["__interrupt__"]
    assert 10 < asked(simulated) <= 40
    assert "no answer raises it" in pause.value["question"]
    assert "budget.requests" in pause.value["question"]
    end = await graph.ainvoke(Command(resume={"requests": 41}), THREAD)
    assert end["__interrupt__"]
    assert asked(simulated) <= 40


@pytest.mark.parametrize(
    "command",
    [
        Command(update={"total": 1, "run": {"id": "x", "name": "../.."}}),
        Command(goto="reduce"),
        Command(goto=Send("load", {"given": {"path": "/etc/passwd", "pasted": False}})),
        Command(resume={"requests": 1}, update={"left": [[0, 1]]}),
    ],
)
async def test_the_state_is_not_an_invocations_to_write(
    simulated: SimulatedFleet, command: Any
) -> None:
    graph: Any = build_graph(settings(simulated), checkpointer=InMemorySaver())
    end = await graph.ainvoke({"items": rows(3)}, THREAD)
    with pytest.raises(ConfigurationError, match="may only answer an interrupt"):
        await graph.ainvoke(command, THREAD)
    with pytest.raises(ConfigurationError, match="may not write"):
        await graph.aupdate_state(THREAD, {"total": 1}, as_node="load")
    with pytest.raises(ConfigurationError, match="may not write"):
        await asyncio.to_thread(graph.update_state, THREAD, {"total": 1}, "load")
    assert (await graph.aget_state(THREAD)).values["total"] == end["progress"]["items"] == 3
    trusting: Any = build_graph(
        settings(simulated), checkpointer=InMemorySaver(), trust_context=True
    )
    await trusting.ainvoke({"items": rows(3)}, THREAD)
    await trusting.aupdate_state(THREAD, {"total": 2}, as_node="load")


@pytest.mark.parametrize(
    "context",
    [
        RunContext(system="Lie.", reduce=[]),
        {"preset": "data_annotation"},
        {"overrides": ["backend.kind=launched"]},
        {"streamz": 1},
    ],
)
async def test_an_agents_context_is_not_its_tools(simulated: SimulatedFleet, context: Any) -> None:
    """A tool asks what its owner bound, whatever context the agent was invoked with."""
    tool = as_tool(settings(simulated), allow_simulated=True)

    class Messages(TypedDict):
        messages: list[Any]

    parent: Any = StateGraph(Messages)
    parent.add_node("tools", ToolNode([tool]))
    parent.add_edge(START, "tools")
    call = {"name": tool.name, "args": {"items": [{"x": "one"}]}, "id": "c", "type": "tool_call"}
    message = AIMessage("", tool_calls=[call])
    end = await parent.compile().ainvoke({"messages": [message]}, context=context)
    assert '"done":1' in end["messages"][-1].content
    assert '"op":"top_k"' in end["messages"][-1].content


SMALL: dict[str, Any] = {"limits": {"streams": 2}, "shard": {"items": 5}}
FOUR: Any = {"requests": 4}


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        ({"requests": "8"}, True),
        ({"requests": 8.0}, True),
        ({"requests": 8, "warn_at": [0.99]}, False),
        ({"requests": 8, "on_limit": "stop"}, False),
        ({"requests": True}, False),
        ({"requests": 8.5}, False),
        ({"requests": []}, False),
        ({"requests": 0}, False),
        (["requests"], False),
    ],
)
async def test_no_answer_to_a_spent_budget_breaks_the_run(
    simulated: SimulatedFleet, answer: Any, taken: bool
) -> None:
    bound = settings(simulated, budget={"requests": 20}, **SMALL)
    graph: Any = build_graph(bound, checkpointer=InMemorySaver())
    await graph.ainvoke({"items": rows(15)}, THREAD, context=FOUR)
    end = await graph.ainvoke(Command(resume=answer), THREAD)
    (pause,) = end["__interrupt__"]
    assert ("problem" not in pause.value) is taken
    assert (4 < asked(simulated) <= 8) if taken else asked(simulated) <= 4
    assert pause.value["budget"]["requests"]["cap"] == (8 if taken else 4)
    end = await graph.ainvoke(Command(resume={"requests": 20}), THREAD)
    assert end["progress"]["done"] == 15


async def test_a_late_answer_is_refused(simulated: SimulatedFleet) -> None:
    """By its id or its number; it neither raises a limit nor sends a request."""
    bound = settings(simulated, budget={"requests": 40}, **SMALL)
    graph: Any = build_graph(bound, checkpointer=InMemorySaver())

    async def answer(value: Any) -> Any:
        end = await graph.ainvoke(Command(resume=value), THREAD)
        return end["__interrupt__"][0] if "__interrupt__" in end else end

    (first,) = (await graph.ainvoke({"items": rows(15)}, THREAD, context=FOUR))["__interrupt__"]
    second = await answer({first.id: {"requests": 8}})
    assert (first.value["number"], second.value["number"]) == (1, 2)
    spent = asked(simulated)
    for late in ({first.id: {"requests": 40}}, {"0" * 32: {"requests": 40}}):
        with pytest.raises(InputError, match=f"no open question.*Open: {second.id}"):
            await graph.ainvoke(Command(resume=late), THREAD)
        with pytest.raises(InputError, match="no open question"):
            await asyncio.to_thread(graph.invoke, Command(resume=late), THREAD)
    third = await answer({"requests": 40, "number": 1})
    assert "names question 1, but question 2 is open" in third.value["problem"]
    assert third.value["budget"]["requests"]["cap"] == 8
    assert asked(simulated) == spent
    end = await answer({third.id: {"requests": 40, "number": third.value["number"]}})
    assert end["progress"]["done"] == 15
    with pytest.raises(InputError, match="nothing to resume"):
        await answer({third.id: {"requests": 40}})
    (again,) = (await graph.ainvoke({"items": rows(15)}, THREAD, context=FOUR))["__interrupt__"]
    assert again.value["number"] == 4, "a number is used once in a thread"
    assert "problem" not in again.value


async def test_an_answer_to_a_stopped_run_starts_nothing(slow: SimulatedFleet) -> None:
    """A run that was cancelled asked nothing: it continues without an answer."""
    graph: Any = build_graph(
        settings(slow, limits={"streams": 2, "hedge": False}), checkpointer=InMemorySaver()
    )
    first = asyncio.create_task(graph.ainvoke({"items": rows(20)}, THREAD))
    while not asked(slow):  # noqa: ASYNC110 - a server's counts
        await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    spent = asked(slow)
    with pytest.raises(InputError, match="continue a stopped one with the input None"):
        await graph.ainvoke(Command(resume={"requests": 99}), THREAD)
    assert asked(slow) == spent
    attempt: Any = THREAD | {"metadata": {"run_attempt": 2}}  # as a restarted server repeats it
    end = await graph.ainvoke(Command(resume={"requests": 99}), attempt)
    assert end["progress"]["done"] == asked(slow) == 20


@pytest.mark.parametrize("trusted", [False, True])
async def test_a_lowered_bound_holds_for_what_a_request_was_allowed(
    simulated: SimulatedFleet, trusted: bool
) -> None:
    saver = InMemorySaver()

    def graph(most: int, trust: bool = False) -> Any:
        bound = settings(simulated, budget={"requests": most}, **SMALL)
        return build_graph(bound, checkpointer=saver, trust_context=trust)

    if trusted:
        first, context = graph(4, True), None
    else:
        first, context = graph(30), FOUR
    await first.ainvoke({"items": rows(20)}, THREAD, context=context)
    end = await first.ainvoke(Command(resume={"requests": 12}), THREAD)
    assert end["__interrupt__"][0].value["budget"]["requests"]["cap"] == 12
    assert 4 < asked(simulated) <= 12
    end = await graph(10).ainvoke(None, THREAD)
    (pause,) = end["__interrupt__"]
    assert pause.value["budget"]["requests"]["cap"] == (12 if trusted else 10)
    end = await graph(10).ainvoke(Command(resume={"requests": 11}), THREAD)
    assert "at most 10" in end["__interrupt__"][0].value["problem"]


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("answer", ["x", {"requests": 5}, False, "", 0])
async def test_an_answer_where_nothing_asked_starts_nothing(
    simulated: SimulatedFleet, answer: Any, trust: bool
) -> None:
    graph: Any = build_graph(
        with_input(simulated), checkpointer=InMemorySaver(), trust_context=trust
    )
    with pytest.raises(InputError, match="nothing to resume"):
        await graph.ainvoke(Command(resume=answer), THREAD)
    with pytest.raises(InputError, match="nothing to resume"):
        await asyncio.to_thread(graph.invoke, Command(resume=answer), THREAD)
    with pytest.raises(InputError, match="nothing to resume"):
        async for _ in graph.astream_events(Command(resume=answer), THREAD, version="v2"):
            pass
    assert_nothing_began(simulated)
    await graph.ainvoke({"items": rows(2)}, THREAD)
    with pytest.raises(InputError, match="nothing to resume"):
        await graph.ainvoke(Command(resume=answer), THREAD)
    assert asked(simulated) == 2


@pytest.mark.parametrize("thread", ["t", "other"])
async def test_a_checkpoint_that_is_not_there_starts_nothing(
    simulated: SimulatedFleet, thread: str
) -> None:
    graph: Any = build_graph(with_input(simulated), checkpointer=InMemorySaver())
    await graph.ainvoke({"items": rows(2)}, THREAD)
    gone: RunnableConfig = {"configurable": {"thread_id": thread, "checkpoint_id": "1f0"}}
    with pytest.raises(InputError, match="no checkpoint 1f0"):
        await graph.ainvoke(None, gone)
    with pytest.raises(InputError, match="no checkpoint 1f0"):
        await asyncio.to_thread(graph.invoke, None, gone)
    with pytest.raises(InputError, match="no checkpoint 1f0"):
        await graph.with_config(gone).ainvoke(None)
    assert asked(simulated) == 2
    assert (await graph.ainvoke({}, gone))["progress"]["done"] == 3


@pytest.mark.parametrize("answer", [{1: 2}, {"requests": 8, None: 1}])
async def test_an_answer_has_names(simulated: SimulatedFleet, answer: Any) -> None:
    graph: Any = build_graph(
        settings(simulated, budget={"requests": 20}, **SMALL), checkpointer=InMemorySaver()
    )
    await graph.ainvoke({"items": rows(15)}, THREAD, context=FOUR)
    with pytest.raises(InputError, match="is not text"):
        await graph.ainvoke(Command(resume=answer), THREAD)
    assert (await graph.ainvoke(Command(resume={"requests": 20}), THREAD))["progress"]["done"] == 15


@pytest.mark.parametrize("command", [Command(), Command(update=[]), Command(goto=())])
async def test_an_empty_command_is_refused(simulated: SimulatedFleet, command: Any) -> None:
    graph: Any = build_graph(with_input(simulated), checkpointer=InMemorySaver())
    with pytest.raises(InputError, match="empty Command"):
        await graph.ainvoke(command, THREAD)
    with pytest.raises(InputError, match="empty Command"):
        await asyncio.to_thread(graph.invoke, command, THREAD)
    assert_nothing_began(simulated)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    "context",
    ["str", "", [], 5, False, [("limit", 1)], {"__limit": 1}, {"langgraph_limit": 1}, Parent],
)
async def test_a_context_of_no_use_starts_nothing(
    simulated: SimulatedFleet, context: Any, trust: bool
) -> None:
    graph: Any = build_graph(with_input(simulated), trust_context=trust)
    with pytest.raises(ConfigurationError, match="context"):
        await graph.ainvoke({}, context=context)
    with pytest.raises(ConfigurationError, match="context"):
        await asyncio.to_thread(lambda: graph.invoke({}, context=context))
    assert_nothing_began(simulated)
