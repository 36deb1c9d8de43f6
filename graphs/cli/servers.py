"""Simulate."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any, Final

import orjson

from ...backends.core.errors import ConfigurationError
from ...backends.discovery.resolve import has_own_servers, make_node_plan
from ...backends.servers.plan import NodePlan
from ...backends.servers.supervisor import SupervisorControl, serve_or_standby
from ...backends.simulated.fleet import SimulatedFleet
from ...backends.simulated.spec import SimulationSpec
from ...backends.storage.run_folder import open_folder
from ...configs.resolve import Overrides
from ..run.console import print_messages

_STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_IGNORED_SIGNALS: Final = (signal.SIGUSR1, signal.SIGUSR2)
"""Schedulers send these to all processes of a job; they ask runs to drain, which need servers."""


def serve_node(config: str, wish: Overrides, folder: Path, host: str | None) -> None:
    """Serve this node until SIGINT, SIGTERM or SIGHUP; a second one waits for nothing.

    Args:
        config: A preset, a settings file, or a run folder.
        wish: What the options ask for.
        folder: The servers folder.
        host: This node's name; asked of the system by default.

    Raises:
        ConfigurationError: The settings do not fit.
        BackendError: All servers were given up.
    """
    path = Path(config)
    source = str(open_folder(path).settings) if path.is_dir() else config
    loaded, _ = wish.resolve(source)
    plan = make_node_plan(loaded.config, folder, host)
    if not has_own_servers(loaded.config):
        msg = (
            f"{loaded.source}: endpoints names servers that somebody else starts; nothing is "
            "started twice: name the servers folder (endpoints.file) or endpoints.hosts"
        )
        raise ConfigurationError(msg)
    before = {number: signal.getsignal(number) for number in (*_STOPPING, *_IGNORED_SIGNALS)}
    try:
        asyncio.run(_serve_until_stopped(plan))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _serve_until_stopped(plan: NodePlan) -> None:
    orders, loop = (
        SupervisorControl(lambda text: print_messages(text.splitlines())),
        asyncio.get_running_loop(),
    )

    def asked(name: str) -> None:
        if orders.stop.is_set():
            orders.stop_waiting.set()
            return
        print_messages(
            [f"{name}: the servers of {plan.host} are being ended; once more waits for nothing"]
        )
        orders.stop.set()

    for number in _STOPPING:
        if signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup
        loop.add_signal_handler(number, asked, number.name)
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    await serve_or_standby(plan, orders)


def serve_simulated(fields: dict[str, Any], file: Path) -> None:
    """Serve a simulated fleet until interrupted."""
    spec = SimulationSpec.from_json(orjson.dumps(fields))
    asyncio.run(_serve_fleet(spec, file))


async def _serve_fleet(spec: SimulationSpec, file: Path) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with SimulatedFleet(spec) as fleet:
        text = "".join(f"{url}\n" for url in fleet.urls)
        await asyncio.to_thread(_write_endpoints, file, text)
        print_messages(
            [
                f"SIMULATED fleet of {spec.nodes} nodes serving {spec.model!r}",
                f"endpoints: {file}  (fanfold run CONFIG --endpoints {file})",
                f"control: {fleet.control_url}   Ctrl-C ends it",
            ]
        )
        await stop.wait()


def _write_endpoints(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be written: {error.strerror}") from None
