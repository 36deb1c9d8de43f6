"""Serves runs and receives their events over Redis; prints the UUIDs of its mailboxes."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from academy.agent import Agent, action
from academy.exchange import RedisExchangeFactory
from academy.manager import Manager

from fanfold import MapReduceAgent
from fanfold.graphs.integrations.academy import plain_exchange


class Listener(Agent):
    """Hears how runs go on."""

    def __init__(self) -> None:
        super().__init__()
        self._heard: list[dict[str, Any]] = []

    @action
    async def progress(self, run_id: str, event: dict[str, Any]) -> None:
        assert event["run_id"] == run_id
        self._heard.append(event)

    @action
    async def heard(self) -> list[dict[str, Any]]:
        return self._heard


async def serve(exchange: dict[str, Any], settings: dict[str, Any], home: str) -> None:
    options = {key: exchange[key] for key in ("password",) if key in exchange}
    factory = RedisExchangeFactory(exchange["host"], exchange["port"], **options)
    async with await Manager.from_exchange_factory(factory) as manager:
        agent = await manager.launch(
            MapReduceAgent,
            args=(settings, home),
            kwargs={"allow_simulated": True, "event_s": 0.05},
            config=plain_exchange(),
        )
        listener = await manager.launch(Listener, config=plain_exchange())
        boxes = (agent.agent_id, listener.agent_id, manager.user_id)
        print(*(box.uid for box in boxes), flush=True)
        await manager.wait({agent})


if __name__ == "__main__":
    asyncio.run(serve(*json.loads(sys.argv[1])))
