"""Simulate."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any, Final

import orjson

from ...backends.core.errors import ConfigurationError
from ...backends.discovery.resolve import node_plan, starts_servers
from ...backends.servers.plan import NodePlan
from ...backends.servers.supervisor import Orders, serve
from ...backends.simulated.fleet import SimulatedFleet
from ...backends.simulated.spec import SimulationSpec
from ...backends.storage.run_folder import open_folder
from ...configs.resolve import Wish
from ..run.console import say

_STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOT_FOR_SERVERS: Final = (signal.SIGUSR1, signal.SIGUSR2)
"""Schedulers send these to all processes of a job; they ask runs to drain, which need servers."""


def serve_node(config: str, wish: Wish, folder: Path, host: str | None) -> None:
    """Serve this node until SIGINT, SIGTERM or SIGHUP; a second one waits for nothing.

    Args:
        config: A preset, a settings file, or a run folder.
        wish: What the options ask for.
        folder: The servers folder.
        host: This node's name; asked of the system by default.

    Raises:
        ConfigurationError: The settings do not fit.
        SiteError: All servers were given up.
    """
    path = Path(config)
    source = str(open_folder(path).settings) if path.is_dir() else config
    loaded, _ = wish.settled(source)
    plan = node_plan(loaded.config, folder, host)
    if not starts_servers(loaded.config):
        msg = (
            f"{loaded.source}: endpoints names servers that somebody else starts; nothing is "
            "started twice: name the servers folder (endpoints.file) or endpoints.hosts"
        )
        raise ConfigurationError(msg)
    before = {number: signal.getsignal(number) for number in (*_STOPPING, *_NOT_FOR_SERVERS)}
    try:
        asyncio.run(_served(plan))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _served(plan: NodePlan) -> None:
    orders, loop = Orders(lambda text: say(text.splitlines())), asyncio.get_running_loop()

    def asked(name: str) -> None:
        if orders.stop.is_set():
            orders.hurry.set()
            return
        say([f"{name}: the servers of {plan.host} are being ended; once more waits for nothing"])
        orders.stop.set()

    for number in _STOPPING:
        if signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup
        loop.add_signal_handler(number, asked, number.name)
    for number in _NOT_FOR_SERVERS:
        signal.signal(number, signal.SIG_IGN)
    await serve(plan, orders)


def simulate(fields: dict[str, Any], file: Path) -> None:
    """Serve a simulated fleet until interrupted."""
    spec = SimulationSpec.from_json(orjson.dumps(fields))
    asyncio.run(_serve(spec, file))


async def _serve(spec: SimulationSpec, file: Path) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with SimulatedFleet(spec) as fleet:
        text = "".join(f"{url}\n" for url in fleet.urls)
        await asyncio.to_thread(_write_endpoints, file, text)
        say(
            [
                f"SIMULATED fleet of {spec.nodes} nodes serving {spec.model!r}",
                f"endpoints: {file}  (fanfold run CONFIG --endpoints {file})",
                f"control: {fleet.base_url}   Ctrl-C ends it",
            ]
        )
        await stop.wait()


def _write_endpoints(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be written: {error.strerror}") from None
