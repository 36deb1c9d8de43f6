"""A server for ``node.serve`` in tests: simulated, on a loopback address of this node.

Usage: ``python node_server.py PORT MODEL SECONDS_PER_ITEM …``
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec


def address() -> str:
    """Return 127.0.0.2 and so on: the test's nodes share one machine."""
    given = os.environ.get("FANFOLD_HOST")
    return given or f"127.0.0.{1 + int(os.environ['SLURMD_NODENAME'].removeprefix('n'))}"


async def main(port: str, model: str, per_item_s: str) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    spec = SimulationSpec(
        nodes=1,
        port=int(port),
        addressing="port",
        host=address(),
        model=model,
        max_num_seqs=4,
        ttft_s=float(per_item_s),
    )
    async with SimulatedFleet(spec):
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
