"""Agents as a user's module would hold them: factories for ``task.graph``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from langchain.agents import create_agent
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
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
