"""fanfold as a step of your own LangGraph graph, in two forms.

``screen`` is the map-reduce itself, added as a node: it shares the keys ``items``, ``aggregate``
and ``results`` with its parent and uses no others. ``why`` calls another map-reduce from a node
function, which maps between your state and fanfold's.

On a simulated fleet: ``python embed_in_graph.py [MOLECULES]``
(needs ``pip install 'fanfold[chem]'``)
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict

from fanfold import build_graph

ESTIMATE: dict[str, Any] = {
    "name": "estimate",
    "input": {"smiles": "smiles"},
    "task": {
        "prompt": "Estimate the aqueous solubility of this molecule.\nSMILES: {smiles}",
        "schema": {
            "type": "object",
            "required": ["log_s"],
            "properties": {"log_s": {"type": "number"}},
        },
    },
    # a real fleet: {urls: [http://node17:8000/v1, …]}
    "endpoints": {"simulated": {"nodes": 2, "responder": "esol", "time_scale": 20}},
    "reduce": [{"op": "top_k", "field": "log_s", "k": 5, "show": ["smiles"]}],
}
EXPLAIN = ESTIMATE | {
    "name": "explain",
    "task": {"prompt": "Why is this molecule soluble in water?\nSMILES: {smiles}"},
    "reduce": [{"op": "collect", "limit": 5}],
}

estimate, explain = build_graph(ESTIMATE), build_graph(EXPLAIN)


class State(TypedDict, total=False):
    """The parent's state; fanfold shares its first three keys."""

    items: list[dict[str, Any]]
    aggregate: list[dict[str, Any]]
    results: dict[str, Any]
    reasons: list[str]


async def ask_why(state: State) -> State:
    """Ask about the best ones: fanfold's input and output are mapped by hand."""
    best = [{"smiles": row["show"]["smiles"]} for row in state["aggregate"][0]["rows"]]
    end = await explain.ainvoke({"items": best})
    return {"reasons": [row["output"] for row in end["aggregate"][0]["rows"]]}


def parent() -> Any:
    """Build the parent graph; its subgraphs use its checkpointer too."""
    graph: Any = StateGraph(State)
    graph.add_node("screen", estimate)
    graph.add_node("why", ask_why)
    graph.add_edge(START, "screen")
    graph.add_edge("screen", "why")
    graph.add_edge("why", END)
    return graph.compile(checkpointer=InMemorySaver())


async def main(count: int) -> list[str]:
    """Run the parent and show the steps of all three graphs as they end."""
    graph = parent()
    thread = {"configurable": {"thread_id": "1"}}
    molecules = [{"smiles": "C" * (n // 2 + 1) + "O" * (n % 2)} for n in range(count)]
    steps = graph.astream({"items": molecules}, thread, stream_mode="updates", subgraphs=True)
    async for namespace, update in steps:
        where = " > ".join(part.partition(":")[0] for part in namespace)
        print(" > ".join(filter(None, [where, *update])))
    state = (await graph.aget_state(thread)).values
    print("simulated:", state["results"]["simulated"], *state["reasons"], sep="\n  ")
    return list(state["reasons"])


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
