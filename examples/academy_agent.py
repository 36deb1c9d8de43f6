"""A screening service for a federation of agents: the whole map-reduce as an agent of Academy.

The ``Chemist`` below does not use fleets or endpoints. It finds the service by its class, starts a
run under an id that it chooses, receives its progress, and asks for the result.

Both agents run in this process; over Redis, HTTP or Globus, each may be on another machine:
``python academy_agent.py [MOLECULES]`` (needs ``pip install 'fanfold[academy,chem]'``)
"""

from __future__ import annotations

import asyncio
import sys
from tempfile import TemporaryDirectory
from typing import Any

from academy.agent import Agent, action
from academy.exchange import LocalExchangeFactory
from academy.handle import Handle
from academy.manager import Manager

from fanfold import MapReduceAgent
from fanfold.graphs.integrations.academy import plain_exchange

SETTINGS: dict[str, Any] = {
    "name": "solubility",
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
    "reduce": [{"op": "top_k", "field": "log_s", "k": 3, "show": ["smiles"]}],
}


class Chemist(Agent):
    """An agent that needs solubilities for a larger task."""

    @action
    async def progress(self, run_id: str, event: dict[str, Any]) -> None:
        """Receive the progress of a run."""
        done = event["progress"].get("done", 0)
        print(f"{run_id}: {event['state']}, {done} done")

    @action
    async def most_soluble(self, smiles: list[str], run_id: str) -> list[str]:
        """Find the most soluble molecules, by a run of the screening service."""
        found = await self.agent_exchange_client.discover(MapReduceAgent)
        service = Handle(found[0])
        request = {"items": [{"smiles": text} for text in smiles]}
        status = await service.start(request, run_id=run_id, listener=str(self.agent_id.uid))
        while status.get("state") in {"starting", "running"}:
            status = await service.result(run_id, wait_s=30)
        if status.get("state") != "done":
            raise RuntimeError(f"no result: {status}")
        rows = status["aggregate"][0]["rows"]
        return [f"{row['show']['smiles']}  {row['value']:.2f}" for row in rows]


async def main(count: int) -> list[str]:
    """Launch both agents; one calls the other."""
    with TemporaryDirectory() as home:
        async with await Manager.from_exchange_factory(LocalExchangeFactory()) as manager:
            await manager.launch(
                MapReduceAgent,
                args=(SETTINGS, home),
                kwargs={"allow_simulated": True},
                config=plain_exchange(),
            )
            chemist = await manager.launch(Chemist, config=plain_exchange())
            molecules = ["C" * (n % 17 + 1) + "O" * (n % 5 > 0) for n in range(count)]
            best: list[str] = await chemist.most_soluble(molecules, "chemist-1")
    print("most soluble (simulated):", *best, sep="\n  ")
    return best


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
