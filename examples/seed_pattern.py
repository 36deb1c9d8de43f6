"""The pattern that fanfold grew out of, on Academy, and the same with fanfold.

The seed: one ``InferenceWorker`` agent per endpoint, items assigned round-robin, results gathered.
It is short and clear, but has costs: two messages through the exchange per item; a slow endpoint
gets as many items as a fast one, and the batch waits for it; a dead worker or a failed call fails
the whole batch; and nothing is on disk until all items are done.

With fanfold, the same questions go to the same endpoints, also over Academy: whole shards go to
agents with a free slot, every answer is in the journal at once, and failures are data.

Both run on a simulated fleet of this machine, with one slow node:
``python seed_pattern.py [ITEMS]``
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import pyarrow.parquet as pq
from academy.agent import Agent, action
from academy.exchange import LocalExchangeFactory
from academy.manager import Manager

from fanfold import RunContext, SimulatedFleet, SimulationSpec, build_graph

PROMPT = "Name one property of sample {n}."


class InferenceWorker(Agent):
    """Agent that calls one endpoint, one item per call.

    Args:
        url: The endpoint's base URL.
        model: The model that it serves.
    """

    def __init__(self, url: str, model: str) -> None:
        super().__init__()
        self._url, self._model = f"{url}/chat/completions", model

    async def agent_on_startup(self) -> None:
        """Open the connections."""
        self._session = aiohttp.ClientSession()

    async def agent_on_shutdown(self) -> None:
        """Close them."""
        await self._session.close()

    @action
    async def infer(self, prompt: str) -> str:
        """Answer one prompt."""
        body = {"model": self._model, "messages": [{"role": "user", "content": prompt}]}
        async with self._session.post(self._url, json=body) as response:
            response.raise_for_status()
            reply = await response.json()
        return str(reply["choices"][0]["message"]["content"])


async def seed_way(fleet: SimulatedFleet, items: list[dict[str, Any]]) -> list[str]:
    """Use one agent per endpoint, round-robin, and gather.

    Returns:
        The answers, in the order of the items.
    """
    prompts = [PROMPT.format(**item) for item in items]
    factory = LocalExchangeFactory()  # on several nodes: Redis or HTTP, and an executor
    async with await Manager.from_exchange_factory(factory) as manager:
        workers = [
            await manager.launch(InferenceWorker, args=(url, fleet.spec.model))
            for url in fleet.urls
        ]
        turns = zip(prompts, cycle(workers), strict=False)
        return list(await asyncio.gather(*(worker.infer(prompt) for prompt, worker in turns)))


async def fanfold_way(fleet: SimulatedFleet, items: list[dict[str, Any]], home: Path) -> list[str]:
    """Do the same as a fanfold run whose shards two Academy agents run.

    Returns:
        The answers, in the order of the items.
    """
    settings = {
        "name": "seed-pattern",
        "task": {"prompt": PROMPT},
        "endpoints": {"urls": list(fleet.urls)},
        # without "exchange", each agent is a separate process
        "backend": {"kind": "academy", "workers": 2, "exchange": {"kind": "local"}},
        "reduce": [{"op": "count"}],
    }
    graph = build_graph(RunContext(config=settings, out=str(home / "run")))
    end = await graph.ainvoke({"items": items})
    return [str(text) for text in pq.read_table(end["results"]["table"])["output"].to_pylist()]


async def main(count: int) -> None:
    """Run both and print their results."""
    items = [{"id": f"s{n}", "n": n} for n in range(count)]
    spec = SimulationSpec(nodes=4, time_scale=10, speeds={0: 0.2}, max_num_seqs=8)
    with TemporaryDirectory() as home:
        for name in ("seed", "fanfold"):
            async with SimulatedFleet(spec) as fleet:
                began = time.perf_counter()
                if name == "seed":
                    answers = await seed_way(fleet, items)
                else:
                    answers = await fanfold_way(fleet, items, Path(home))
                report(name, answers, time.perf_counter() - began, fleet)


def report(name: str, answers: list[str], seconds: float, fleet: SimulatedFleet) -> None:
    """Print one line: answers, time, and requests per endpoint."""
    nodes = [node["requests"] for node in fleet.stats()["nodes"]]
    known = Counter(bool(answer) for answer in answers)[True]
    print(f"{name:8} {known} simulated answers in {seconds:.1f} s; requests per node: {nodes}")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 400))
