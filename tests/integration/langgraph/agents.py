"""Agents as in a user's module: factories for ``task.graph``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from langchain.agents import create_agent
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import tool
from langgraph.errors import GraphDrained
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.runtime import Runtime
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, interrupt
from pydantic import BaseModel
from typing_extensions import TypedDict


@tool
def weigh(smiles: str) -> float:
    """Weigh a molecule."""
    return float(len(smiles))


@tool
def count(smiles: str) -> int:
    """Count a molecule's atoms."""
    return len(smiles)


def chemist(model: Any) -> Any:
    """Calls both tools, then answers in words."""
    return create_agent(model, [weigh, count])


class Talk(TypedDict):
    """A conversation."""

    messages: Annotated[list[Any], add_messages]


def runaway(model: Any) -> Any:
    """Never comes to an end: each answer is a reason to ask again."""

    async def think(state: Talk) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"]), ("user", "Go on.")]}

    graph: Any = StateGraph(Talk)
    graph.add_node("think", think)
    graph.add_edge(START, "think")
    graph.add_edge("think", "think")
    return graph.compile()


def stuck(model: Any) -> Any:
    """Waits for ever on every third item."""
    calls = iter(range(10_000))

    async def call(given: dict[str, Any]) -> dict[str, Any]:
        answer = await model.ainvoke(given["messages"])
        if next(calls) % 3 == 0:
            await asyncio.Event().wait()
        return {"output": str(answer.text)}

    return RunnableLambda(call)


ready: RunnableLambda[dict[str, Any], dict[str, Any]] = RunnableLambda(
    lambda given: {"output": f"about {given['smiles']}"}
)


def uncompiled(model: Any) -> Any:  # noqa: ARG001 - the factory's form
    """Forgets to compile."""
    return StateGraph(Talk)


def streaming(model: Any) -> Any:
    """Reads its answers as streams, twice."""

    async def call(given: dict[str, Any]) -> dict[str, Any]:
        for _ in range(2):
            parts = [part async for part in model.astream(given["messages"])]
        return {"output": "".join(str(part.text) for part in parts)}

    return RunnableLambda(call)


class Weight(BaseModel):
    """An answer of a class."""

    grams: float


def structured(model: Any) -> Any:
    """Asks for an answer of a class, twice."""
    bound = model.with_structured_output(Weight, method="json_schema")

    async def call(given: dict[str, Any]) -> dict[str, Any]:
        await bound.ainvoke(given["messages"])
        return {"output": await bound.ainvoke(given["messages"])}

    return RunnableLambda(call)


class Count(TypedDict, total=False):
    """A number of steps taken."""

    n: int
    messages: list[Any]
    output: str


def patient(model: Any) -> Any:  # noqa: ARG001 - the factory's form
    """Takes 30 steps, and no call."""
    graph: Any = StateGraph(Count)
    graph.add_node("step", lambda state: {"n": state.get("n", 0) + 1})
    graph.add_node("end", lambda state: {"output": f"after {state['n']} steps"})
    graph.add_edge(START, "step")
    graph.add_conditional_edges("step", lambda state: "step" if state["n"] < 30 else "end")
    return graph.compile()


def tasked(model: Any) -> Any:  # noqa: ARG001 - the factory's form
    """Needs two places at a time: one for itself, and one for the task that it waits for."""

    @task
    async def half(text: str) -> str:
        return text[: len(text) // 2]

    @entrypoint()
    async def work(given: dict[str, Any]) -> dict[str, Any]:
        return {"output": await half(given["smiles"])}

    return work


def nosy(model: Any) -> Any:  # noqa: ARG001 - the factory's form
    """Report what it finds about the process that runs the batch."""

    async def look(_: Count, config: RunnableConfig, runtime: Runtime[Any]) -> Count:
        configurable = config["configurable"]
        names = sorted(key for key in configurable if not key.startswith("__"))
        found = {
            "limit": config.get("recursion_limit"),
            "concurrency": config.get("max_concurrency"),
            "durability": configurable.get("__pregel_durability"),
            "tags": [tag for tag in config.get("tags", ()) if ":" not in tag],
            "context": runtime.context,
            "store": type(runtime.store).__name__,
            "drain": runtime.drain_requested,
            "keys": [n for n in names if not n.startswith("checkpoint_")],
        }
        return {"output": str(found)}

    graph: Any = StateGraph(Count)
    graph.add_node("look", look)
    graph.add_edge(START, "look")
    return graph.compile(store=InMemoryStore())


def asking(model: Any) -> Any:
    """Calls the model once, and then wants a human's word."""

    async def ask(state: Count) -> Count:
        await model.ainvoke(state["messages"])
        return {"output": f"the human said {interrupt('may I?')}"}

    graph: Any = StateGraph(Count)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    return graph.compile()


def deserter(model: Any) -> Any:  # noqa: ARG001 - the factory's form
    """Wants its parent to go on elsewhere."""
    graph: Any = StateGraph(Count)
    graph.add_node("go", lambda _: Command(graph=Command.PARENT, goto="prepare"))
    graph.add_edge(START, "go")
    return graph.compile()


def clashing(model: Any) -> Any:  # noqa: ARG001 - the factory's form
    """Two of its nodes write one key in one step."""
    graph: Any = StateGraph(Count)
    for name in ("a", "b"):
        graph.add_node(name, lambda _: {"n": 1})
        graph.add_edge(START, name)
    return graph.compile()


def drained(model: Any) -> Any:  # noqa: ARG001 - the factory's form
    """Raises what LangGraph raises to stop a graph."""

    async def stop(_: dict[str, Any]) -> Any:
        raise GraphDrained("by itself")

    return RunnableLambda(stop)


def cancelling(model: Any) -> Any:  # noqa: ARG001 - the factory's form
    """Raises what asyncio raises in a task that is cancelled."""

    async def stop(_: dict[str, Any]) -> Any:
        raise asyncio.CancelledError("by itself")

    return RunnableLambda(stop)
