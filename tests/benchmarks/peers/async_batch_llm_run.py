"""The same questions with async-batch-llm: ``process_stream`` with a checkpoint.

``python async_batch_llm_run.py URL ITEMS STREAMS``: asks the rows of ``items.csv`` and writes
``async_batch_llm-ITEMS.sqlite``. Settings as documented for large runs: a stream of results,
bounded queues, a pool with a connection for each call, and the SQLite checkpoint.
"""

from __future__ import annotations

import asyncio
import csv
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from async_batch_llm import (
    ArtifactIdentity,
    OpenAICompatibleModel,
    OpenAIStrategy,
    ProcessorConfig,
    SqliteArtifactStore,
    process_stream,
)


def read_prompts(task: dict[str, Any], items: int) -> Iterator[tuple[str, str]]:
    """Yield id and prompt of the first rows of the input."""
    with Path("items.csv").open() as file:
        for row in islice(csv.DictReader(file), items):
            yield row["id"], task["prompt"].format(**row)


async def main(url: str, items: int, streams: int) -> int:
    """Ask about the rows, so many at a time, and return the number of answers."""
    task = json.loads(Path("task.json").read_text())
    body = dict(task["body"])
    model_name = body.pop("model")
    path = Path(f"async_batch_llm-{items}.sqlite")
    for old in path.parent.glob(path.name + "*"):
        old.unlink()
    model = OpenAICompatibleModel.from_api_key(
        model_name,
        "EMPTY",
        base_url=url,
        system_instruction=task["system"],
        extra_body=body,
        max_connections=streams,
    )
    strategy = OpenAIStrategy(model, response_parser=lambda answer: json.loads(answer.text))
    config = ProcessorConfig(
        concurrency=streams, max_queue_size=2 * streams, max_result_queue_size=2 * streams
    )
    identity = ArtifactIdentity(provider="simulated", model=model_name, prompt_version="1")
    store = SqliteArtifactStore(str(path), identity=identity)
    done = 0
    prompts = read_prompts(task, items)
    async for result in process_stream(strategy, prompts, config=config, artifact_store=store):
        done += bool(result.success)
    return done


if __name__ == "__main__":
    found = asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    print(json.dumps({"done": found}))
