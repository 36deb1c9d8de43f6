"""The same questions with datatrove: its ``InferenceRunner`` over a running server.

``python datatrove_run.py URL ITEMS STREAMS``: asks the rows of ``items.csv`` and writes
``datatrove-ITEMS/``. Settings as documented: chunks with checkpoints and the cache of requests,
all requests at once; for an ``http`` address of this machine it uses sockets of its own.
"""

from __future__ import annotations

import csv
import json
import sys
from itertools import islice
from pathlib import Path
from shutil import rmtree
from typing import Any

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.writers.jsonl import JsonlWriter


def main(url: str, items: int, streams: int) -> None:
    """Ask about the rows, so many at a time."""
    task = json.loads(Path("task.json").read_text())
    body = dict(task["body"])
    folder = Path(f"datatrove-{items}")
    rmtree(folder, ignore_errors=True)

    async def ask(document: Document, generate: Any) -> dict[str, Any]:
        messages = [
            {"role": "system", "content": task["system"]},
            {"role": "user", "content": task["prompt"].format(text=document.text)},
        ]
        found = await generate({"messages": messages})
        answer: dict[str, Any] = json.loads(found.text)
        return answer

    config = InferenceConfig(
        server_type="endpoint",
        endpoint_url=url.removesuffix("/v1"),
        model_name_or_path=body.pop("model"),
        default_generation_params=body,
        max_concurrent_generations=streams,
    )
    with Path("items.csv").open() as file:
        rows = islice(csv.DictReader(file), items)
        documents = [Document(text=row["text"], id=row["id"]) for row in rows]
    runner = InferenceRunner(
        rollout_fn=ask,
        config=config,
        output_writer=JsonlWriter(
            str(folder / "out"), output_filename="${rank}_${chunk_index}.jsonl", compression=None
        ),
        checkpoints_local_dir=str(folder / "checkpoints"),
    )
    LocalPipelineExecutor(
        pipeline=[documents, runner], logging_dir=str(folder / "log"), tasks=1
    ).run()
    lines = sum(len(file.read_text().splitlines()) for file in (folder / "out").glob("*.jsonl"))
    print(json.dumps({"done": lines}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
