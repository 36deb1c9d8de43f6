"""Endpoints that only answer on their own node: how a worker finds them."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from ...configs.models import RunConfig
from ..core.errors import BackendError, ConfigurationError, NoEndpointError, RunStoppedError
from ..fleet.endpoint import EndpointSpec, merge_spellings
from ..servers.client import check_failure, use_servers
from ..servers.plan import NodePlan
from .connect import ReadyEndpoints, open_ready_endpoints
from .resolve import (
    EndpointSet,
    get_endpoints_key,
    get_host_name,
    has_own_servers,
    is_simulated_command,
    list_endpoint_specs,
    make_node_plan,
)
from .sources import FileSource, get_trusted_key, parse_endpoints_file

ENDPOINTS_VARIABLE: Final = "FANFOLD_ENDPOINTS"
"""Variable of a worker: base URLs of its node's endpoints, separated by blanks or commas."""
PORT_VARIABLES: Final = ("FANFOLD_PORT", "PORT")
"""Variables of a worker: port of the only server on its node."""
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


@asynccontextmanager
async def ready_endpoints(
    config: RunConfig, written: Mapping[str, Any], model: str | None = None
) -> AsyncIterator[ReadyEndpoints]:
    """Probe the endpoints, unless each worker has endpoints of its own.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.
        model: The model's name if it is already settled; else the configured one.

    Raises:
        ConfigurationError: No endpoint answers, none serves the model, or the model is not named
            and the endpoints cannot be probed from here.
    """
    if not config.backend.node_endpoints:
        async with open_ready_endpoints(config, written, model) as up:
            yield up
        return
    own = config.endpoints.simulated is not None
    name, simulated = model or config.model.name, own or is_simulated_command(config)
    if name is None and not own:
        msg = (
            "backend.node_endpoints: the nodes' endpoints cannot be probed from here, so the "
            "model is unknown; set model.name"
        )
        raise ConfigurationError(msg)
    yield ReadyEndpoints((), name or "", simulated)


@asynccontextmanager
async def node_endpoints(
    config: RunConfig,
    written: Mapping[str, Any],
    model: str,
    simulated: bool,
    get_stop_reason: Callable[[], str | None],
) -> AsyncIterator[ReadyEndpoints]:
    """Yield the endpoints that a worker uses on its own node.

    A simulated fleet is started here. So are the servers of ``node.serve``, unless they already run
    or the variable ``FANFOLD_ENDPOINTS`` names others.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.
        model: The run's model.
        simulated: Whether the run is simulated.
        get_stop_reason: Returns why to stop waiting for servers, or None; may block briefly.

    Raises:
        BackendError: The endpoints of this node are not configured.
        RunStoppedError: The node's servers do not start; with their last log lines.
        ConfigurationError: The settings do not fit this node.
    """
    if config.endpoints.simulated is not None:
        async with open_ready_endpoints(config, written, model) as up:
            yield up
    elif has_own_servers(config) and not os.environ.get(ENDPOINTS_VARIABLE):
        key = get_endpoints_key(config.endpoints)
        plan = make_node_plan(config, get_servers_folder(config))
        async with use_servers(plan, get_stop_reason) as file:
            source = _NodeServers(plan, FileSource(file, key))
            try:
                specs = tuple(await source.list_endpoints())
            except NoEndpointError as error:  # the servers were ready a moment ago
                raise RunStoppedError(f"{get_host_name()}: {error.message}") from None
            yield ReadyEndpoints(specs, model, simulated, endpoint_set=EndpointSet(specs, source))
    else:
        yield ReadyEndpoints(tuple(find_node_specs(config, written)), model, simulated)


class _NodeServers:
    """The servers of this node, until they have failed for good.

    Args:
        plan: What is served.
        source: The node's endpoints file.
    """

    def __init__(self, plan: NodePlan, source: FileSource) -> None:
        self._plan, self._source = plan, source

    async def list_endpoints(self) -> list[EndpointSpec]:
        """Return the servers that are ready.

        Raises:
            NoEndpointError: No server is ready at present.
            RunStoppedError: All servers have failed for good.
        """
        try:
            return await self._source.list_endpoints()
        except NoEndpointError:
            await asyncio.to_thread(check_failure, self._plan)
            raise


def get_servers_folder(config: RunConfig) -> Path:
    """Return the folder in which nodes list their endpoints.

    Raises:
        ConfigurationError: The settings name no folder.
    """
    folder = config.backend.registry or config.endpoints.file
    if folder is None:
        msg = (
            "node.serve: set backend.registry to a folder that all nodes can access; each node "
            "writes its endpoints there"
        )
        raise ConfigurationError(msg)
    return Path(folder)


def find_node_specs(
    config: RunConfig,
    written: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    host: str | None = None,
) -> list[EndpointSpec]:
    """Return the endpoints of this node.

    The first source that exists is used: the variable ``FANFOLD_ENDPOINTS``; those configured
    endpoints that name this host or loopback; the endpoints file ``backend.registry``/HOST; and
    ``http://127.0.0.1:$FANFOLD_PORT`` or ``$PORT``.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.
        environment: Variables; by default those of the process.
        host: Name of this host; by default the one that the system reports.

    Raises:
        BackendError: None of the sources exists.
        ConfigurationError: A source exists but cannot be read.
    """
    environment = os.environ if environment is None else environment
    host = host or get_host_name()
    key = config.endpoints.api_key.get_secret_value()
    if given := environment.get(ENDPOINTS_VARIABLE):
        return merge_spellings(EndpointSpec(url, key) for url in re.split(r"[,\s]+", given.strip()))
    if own := [s for s in list_endpoint_specs(config.endpoints, written) if _is_here(s.url, host)]:
        return own
    file = _find_host_file(config.backend.registry, host)
    if file is not None:
        text = file.read_text(encoding="utf-8-sig")
        return parse_endpoints_file(text, str(file), get_trusted_key(file, key))
    for name in PORT_VARIABLES:
        if port := environment.get(name):
            return [EndpointSpec(f"http://127.0.0.1:{port}", key)]
    msg = (
        f"{host}: the endpoints of this node are not configured: set {ENDPOINTS_VARIABLE} or PORT "
        "on the workers, list them in endpoints, or write one file per host to backend.registry"
    )
    raise BackendError(msg)


def _is_here(url: str, host: str) -> bool:
    named, short = urlsplit(url).hostname or "", host.lower().partition(".")[0]
    label = named.lower().partition(".")[0]
    return named in _LOOPBACK or re.fullmatch(rf"{re.escape(short)}(-hsn\d*)?", label) is not None


def _find_host_file(registry: str | None, host: str) -> Path | None:
    if registry is None:
        return None
    files = (Path(registry) / name for name in dict.fromkeys((host, host.partition(".")[0])))
    return next((file for file in files if file.is_file()), None)
