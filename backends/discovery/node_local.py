"""Endpoints that answer only on their own node: whom a worker asks there."""

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
from ..fleet.endpoint import EndpointSpec
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
"""Variables of a worker: port of the one server on its node."""
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


@asynccontextmanager
async def ready_endpoints(
    config: RunConfig, written: Mapping[str, Any], model: str | None = None
) -> AsyncIterator[ReadyEndpoints]:
    """Ask the endpoints what they serve, unless each worker has endpoints of its own.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.
        model: The model's name when it was settled before; else the configured one.

    Raises:
        ConfigurationError: No endpoint answers, none serves the model, or the model is not named
            and nobody can be asked from here.
    """
    if not config.backend.node_endpoints:
        async with open_ready_endpoints(config, written, model) as up:
            yield up
        return
    own = config.endpoints.simulated is not None
    name, simulated = model or config.model.name, own or is_simulated_command(config)
    if name is None and not own:
        msg = (
            "backend.node_endpoints: the nodes' endpoints cannot be asked from here what they "
            "serve; set model.name"
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
    """Return what a worker asks on its own node.

    A simulated fleet is started there; so are the servers of ``node.serve``, unless they are
    there already, or the variable ``FANFOLD_ENDPOINTS`` names others.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.
        model: The run's model.
        simulated: Whether the run is simulated.
        get_stop_reason: Tells why servers are waited for no longer, or None; may block for a
            moment.

    Raises:
        BackendError: Nothing says where this node's endpoints are.
        RunStoppedError: The node's servers do not come up; with their last lines.
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
            except NoEndpointError as error:  # it was there a moment ago
                raise RunStoppedError(f"{get_host_name()}: {error.message}") from None
            yield ReadyEndpoints(specs, model, simulated, endpoint_set=EndpointSet(specs, source))
    else:
        yield ReadyEndpoints(tuple(find_node_specs(config, written)), model, simulated)


class _NodeServers:
    """The servers of this node, until they are given up.

    Args:
        plan: What is served.
        source: The node's endpoints file.
    """

    def __init__(self, plan: NodePlan, source: FileSource) -> None:
        self._plan, self._source = plan, source

    async def list_endpoints(self) -> list[EndpointSpec]:
        """Return the servers that are ready.

        Raises:
            NoEndpointError: None is at present.
            RunStoppedError: None will be any more.
        """
        try:
            return await self._source.list_endpoints()
        except NoEndpointError:
            await asyncio.to_thread(check_failure, self._plan)
            raise


def get_servers_folder(config: RunConfig) -> Path:
    """Return the folder to which nodes write whom they serve.

    Raises:
        ConfigurationError: The settings name none.
    """
    folder = config.backend.registry or config.endpoints.file
    if folder is None:
        msg = (
            "node.serve: set backend.registry, a folder that all nodes reach, to which each writes "
            "its endpoints"
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

    The first that is there counts: the variable ``FANFOLD_ENDPOINTS``; those of the configured
    endpoints that name this host or loopback; the file ``backend.registry``/HOST, an endpoints
    file; and ``http://127.0.0.1:$FANFOLD_PORT`` or ``$PORT``.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.
        environment: Variables; the process's own by default.
        host: Name of this host; asked of the system by default.

    Raises:
        BackendError: None of them is there.
        ConfigurationError: One is there and cannot be read.
    """
    environment = os.environ if environment is None else environment
    host = host or get_host_name()
    key = config.endpoints.api_key.get_secret_value()
    if given := environment.get(ENDPOINTS_VARIABLE):
        return [EndpointSpec(url, key) for url in re.split(r"[,\s]+", given.strip())]
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
        f"{host}: nothing says where this node's endpoints are: set {ENDPOINTS_VARIABLE} or PORT "
        "where "
        "workers run, name them in endpoints, or write one file per host into backend.registry"
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
