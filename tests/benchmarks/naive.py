"""The plain LangGraph program: a Send per item, stock ChatOpenAI, a SqliteSaver.

``python naive.py URL ITEMS STREAMS``: asks the rows of ``items.csv`` and writes ``naive.jsonl``.
"""

from __future__ import annotations

import asyncio
import csv
import json
import operator
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from langchain_openai import ChatOpenAI
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from pydantic import SecretStr
from typing_extensions import TypedDict


class Row(TypedDict):
    """One row of the input."""

    id: str
    text: str


class State(TypedDict):
    """The rows, and the answers so far."""

    rows: list[Row]
    answers: Annotated[list[dict[str, Any]], operator.add]


def read_rows(items: int) -> list[Row]:
    """Return the first rows of the input."""
    with Path("items.csv").open() as file:
        return [Row(id=one["id"], text=one["text"]) for one in islice(csv.DictReader(file), items)]


async def main(url: str, rows: list[Row], streams: int) -> list[dict[str, Any]]:
    """Return the answers about the rows, so many asked at a time."""
    task = json.loads(Path("task.json").read_text())
    body = dict(task["body"])
    model = ChatOpenAI(
        model=body.pop("model"),
        base_url=url,
        api_key=SecretStr("EMPTY"),
        temperature=body.pop("temperature"),
        max_completion_tokens=body.pop("max_completion_tokens"),
        model_kwargs=body,
        timeout=600,
    )

    async def ask(state: Row) -> dict[str, Any]:
        messages = [("system", task["system"]), ("user", task["prompt"].format(**state))]
        answer = await model.ainvoke(messages)
        return {"answers": [{"id": state["id"], "output": json.loads(str(answer.content))}]}

    def fan_out(state: State) -> list[Send]:
        return [Send("ask", row) for row in state["rows"]]

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_conditional_edges(START, fan_out)
    builder.add_edge("ask", END)
    async with AsyncSqliteSaver.from_conn_string("naive.sqlite") as saver:
        graph = builder.compile(checkpointer=saver)
        config: Any = {"max_concurrency": streams, "configurable": {"thread_id": str(len(rows))}}
        end = await graph.ainvoke({"rows": rows, "answers": []}, config)
    answers: list[dict[str, Any]] = end["answers"]
    return answers


if __name__ == "__main__":
    found = asyncio.run(main(sys.argv[1], read_rows(int(sys.argv[2])), int(sys.argv[3])))
    with Path("naive.jsonl").open("w") as out:
        out.writelines(json.dumps(one) + "\n" for one in found)
