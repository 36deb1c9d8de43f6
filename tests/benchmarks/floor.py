"""The floor of the comparison: one aiohttp loop, with no retries, journal or checks.

``python floor.py URL ITEMS STREAMS``: asks the rows of ``items.csv`` and writes ``floor.jsonl``.
"""

from __future__ import annotations

import asyncio
import csv
import json
import sys
from itertools import islice
from pathlib import Path
from typing import TextIO

import aiohttp


def read_rows(items: int) -> list[dict[str, str]]:
    """Return the first rows of the input."""
    with Path("items.csv").open() as file:
        return list(islice(csv.DictReader(file), items))


async def main(url: str, rows: list[dict[str, str]], streams: int, out: TextIO) -> None:
    """Ask about the rows, so many at a time."""
    task = json.loads(Path("task.json").read_text())
    waiting = iter(rows)
    connector = aiohttp.TCPConnector(limit=streams)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def work() -> None:
            for row in waiting:
                messages = [
                    {"role": "system", "content": task["system"]},
                    {"role": "user", "content": task["prompt"].format(**row)},
                ]
                body = task["body"] | {"messages": messages}
                async with session.post(f"{url}/chat/completions", json=body) as answer:
                    found = await answer.json()
                text = found["choices"][0]["message"]["content"]
                out.write(json.dumps({"id": row["id"], "output": json.loads(text)}) + "\n")

        await asyncio.gather(*(work() for _ in range(streams)))


if __name__ == "__main__":
    with Path("floor.jsonl").open("w") as file:
        asyncio.run(main(sys.argv[1], read_rows(int(sys.argv[2])), int(sys.argv[3]), file))
