"""``fanfold serve`` and ``fanfold simulate``: run model servers or a simulated fleet."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any, Final

import orjson

from ...backends.core.errors import ConfigurationError
from ...backends.core.terminal import count_nouns
from ...backends.discovery.resolve import has_own_servers, make_node_plan
from ...backends.servers.node_supervisor import SupervisorControl, serve_or_standby
from ...backends.servers.plan import NodePlan
from ...backends.simulated.fleet import SimulatedFleet
from ...backends.simulated.serve import serve_fleet
from ...backends.simulated.spec import SimulationSpec
from ...backends.storage.run_folder import open_folder
from ...configs.loader import LoadedConfig
from ...configs.overrides import Overrides
from ..run.console import print_messages

_STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_IGNORED_SIGNALS: Final = (signal.SIGUSR1, signal.SIGUSR2)
"""Schedulers send these to all processes of a job; runs then drain and still need servers."""


def serve_node(config: str, overrides: Overrides, folder: Path, host: str | None) -> None:
    """Serve this node until SIGINT, SIGTERM or SIGHUP; a second signal stops without waiting.

    Args:
        config: A preset, a settings file, or a run folder.
        overrides: Settings changed by options.
        folder: The servers folder.
        host: This node's name; default: the system's host name.

    Raises:
        ConfigurationError: The settings do not fit.
        BackendError: All servers failed for good.
    """
    path = Path(config)
    source = str(open_folder(path).settings) if path.is_dir() else config
    loaded, _ = overrides.resolve(source)
    if loaded.config.stages is not None:
        loaded = _find_served(loaded)
    plan = make_node_plan(loaded.config, folder, host)
    if not has_own_servers(loaded.config):
        msg = (
            f"{loaded.source}: endpoints refers to servers that fanfold does not start; set "
            "endpoints.file to the servers folder, or set endpoints.hosts"
        )
        raise ConfigurationError(msg)
    before = {number: signal.getsignal(number) for number in (*_STOPPING, *_IGNORED_SIGNALS)}
    try:
        asyncio.run(_serve_until_stopped(plan))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _find_served(loaded: LoadedConfig) -> LoadedConfig:
    """Return the settings of the stages of a pipeline whose model is served.

    Raises:
        ConfigurationError: There is none, or there are several models.
    """
    from ..run.pipeline import list_served

    served = list_served(loaded)
    if len(served) != 1:
        models = ", ".join(served) or "none"
        msg = (
            f"{loaded.source}: 'fanfold serve' serves one model; models that the stages take from "
            f"node.serve: {models}. With backend.node_endpoints, workers start the servers of each "
            "stage"
        )
        raise ConfigurationError(msg)
    return next(iter(served.values()))


async def _serve_until_stopped(plan: NodePlan) -> None:
    control, loop = (
        SupervisorControl(lambda text: print_messages(text.splitlines())),
        asyncio.get_running_loop(),
    )

    def request_stop(name: str) -> None:
        if control.stop.is_set():
            control.stop_waiting.set()
            return
        print_messages(
            [f"{name}: stopping the servers of {plan.host}; repeat to stop without waiting"]
        )
        control.stop.set()

    for number in _STOPPING:
        if signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup
        loop.add_signal_handler(number, request_stop, number.name)
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    await serve_or_standby(plan, control)


def serve_simulated(fields: dict[str, Any], file: Path) -> None:
    """Serve a simulated fleet until interrupted.

    Raises:
        ConfigurationError: The fleet cannot start, or the file of endpoints cannot be written.
    """
    spec = SimulationSpec.from_json(orjson.dumps(fields))

    def announce(fleet: SimulatedFleet) -> None:
        try:
            file.write_text("".join(f"{url}\n" for url in fleet.urls))
        except OSError as error:
            raise ConfigurationError(f"{file}: cannot be written: {error.strerror}") from None
        print_messages(
            [
                f"SIMULATED fleet of {count_nouns(spec.nodes, 'node')} serving {spec.model!r}",
                f"endpoints: {file}  (fanfold run CONFIG --endpoints {file})",
                f"control: {fleet.control_url}   Ctrl-C stops it",
            ]
        )

    asyncio.run(serve_fleet(spec, announce))
