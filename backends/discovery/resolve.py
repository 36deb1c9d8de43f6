"""From settings to endpoints that can be probed, and to a node's server plan."""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ...configs.backend import NAMES
from ...configs.endpoints import EndpointsConfig, FirstConfig
from ...configs.models import RunConfig
from ..core.errors import ConfigurationError, NoEndpointError, RunStoppedError
from ..core.secrets import MASKED
from ..core.templates import names_of, split_command
from ..fleet.endpoint import ApiKey, EndpointSpec, base_url
from ..servers.plan import NodePlan, accelerator_ids, server_plans
from ..simulated.process import MODULE
from .gateway import CommandToken, Gateway
from .probe import Found, discover
from .sources import (
    HostsFolder,
    RegistrySource,
    Source,
    expand_slurm,
    hosts_to_specs,
    parse_endpoints_file,
    parse_pbs,
    trusted_key,
)

PROBE_TIMEOUT_S: Final = 5.0
_PORT: Final = 8000
"""Where vLLM listens by default, and Aegis' first instance of a node."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model may be served.

    Attributes:
        specs: The endpoints.
        source: Their list, when it may change during a run.
        gateway: The gateway that they are behind, or None for nodes.
        requests_per_s: The gateway's quota, or None.
        found: What they said, when they were asked already.
        model: The model's name, when the place settles it and the settings do not.
        why: Why the place was chosen, when nobody named it.
    """

    specs: tuple[EndpointSpec, ...]
    source: Source | None = None
    gateway: Gateway | None = None
    requests_per_s: float | None = None
    found: tuple[Found, ...] | None = None
    model: str | None = None
    why: str | None = None

    async def ask(self, timeout_s: float = PROBE_TIMEOUT_S) -> list[Found]:
        """Return what the endpoints say of themselves.

        Raises:
            ConfigurationError: The gateway's token cannot be had.
        """
        if self.found is not None:
            return list(self.found)
        if self.gateway is None:
            return await discover(self.specs, timeout_s)
        try:
            return await self.gateway.discover(2 * timeout_s)
        except RunStoppedError as error:
            raise ConfigurationError(error.message) from None


def endpoint_specs(endpoints: EndpointsConfig, written: Mapping[str, Any]) -> list[EndpointSpec]:
    """Return the endpoints that can be named without asking anybody.

    A registry and ``auto`` name none.

    Args:
        endpoints: The settings, variables expanded.
        written: The same as the user wrote them: what may be shown.

    Raises:
        ConfigurationError: None given, a malformed URL, an unreadable file, no key.
    """
    key = endpoints_key(endpoints)
    if endpoints.auto or endpoints.aegis_registry is not None:
        return []
    if endpoints.first is not None:
        return list(_gateway(endpoints.first, endpoints.proxy).specs)
    if endpoints.file is not None:
        specs = _from_file(Path(endpoints.file), key)
    elif endpoints.hosts is not None:
        specs = _from_hosts(endpoints, key)
    else:
        specs = _from_urls(endpoints, written, key)
    return [replace(spec, proxied=bool(endpoints.proxy)) for spec in specs]


def check_place(endpoints: EndpointsConfig, written: Mapping[str, Any]) -> None:
    """Check what can be said of the endpoints without asking anybody.

    Raises:
        ConfigurationError: Something is malformed, or cannot be read.
    """
    if endpoints.aegis_registry is not None:
        registry(endpoints)
    elif not endpoints.auto:
        try:
            endpoint_specs(endpoints, written)
        except NoEndpointError:
            if not endpoints.awaited:
                raise


def first_place(first: FirstConfig, proxy: bool | None) -> Place:
    """Return the deployments behind a gateway."""
    gateway = _gateway(first, proxy)
    return Place(gateway.specs, gateway=gateway, requests_per_s=first.requests_per_s)


def endpoints_key(endpoints: EndpointsConfig) -> str:
    """Return the key of all endpoints.

    Raises:
        ConfigurationError: It was written out, and a run folder did not keep it.
    """
    key = endpoints.api_key.get_secret_value()
    if key == MASKED:
        raise ConfigurationError(_masked("endpoints.api_key"))
    return key


def _masked(where: str) -> str:
    return (
        f"{where}: a run folder does not keep a key that was written out; give it "
        f"again, best by a variable: --set '{where}=${{VAR}}'"
    )


def registry(endpoints: EndpointsConfig) -> RegistrySource:
    """Return Aegis' registry.

    Raises:
        ConfigurationError: Its URL is none.
    """
    url = endpoints.aegis_registry or ""
    with_where("endpoints.aegis_registry", url)
    return RegistrySource(url, endpoints_key(endpoints))


def _gateway(first: FirstConfig, proxy: bool | None) -> Gateway:
    key: ApiKey
    if first.token_command is not None:
        key = CommandToken(first.token_command, "endpoints.first.token_command")
    else:
        assert first.token is not None, "one of the two is given"
        key = first.token.get_secret_value()
        if key == MASKED:
            raise ConfigurationError(_masked("endpoints.first.token"))
    with_where("endpoints.first.base_url", first.base_url)
    try:
        return Gateway.of(first.base_url, first.paths, key, proxy is not False)
    except ConfigurationError as error:
        raise ConfigurationError(f"endpoints.first.paths: {error.message}") from None


def _from_urls(
    endpoints: EndpointsConfig, written: Mapping[str, Any], key: str
) -> list[EndpointSpec]:
    if not endpoints.urls:
        msg = "endpoints.urls is empty; give base URLs such as http://node17:8000/v1"
        raise ConfigurationError(msg)
    shown = written.get("urls") or endpoints.urls
    return [
        EndpointSpec(
            with_where(f"endpoints.urls.{n}", url), key, label=text if "${" in text else None
        )
        for n, (url, text) in enumerate(zip(endpoints.urls, shown, strict=True))
    ]


def with_where(where: str, url: str) -> str:
    """Return a base URL in one spelling.

    Raises:
        ConfigurationError: It is none, or holds a password; names the setting.
    """
    if "@" in url.partition("//")[2].partition("/")[0]:
        raise ConfigurationError(f"{where}: no user or password in a URL; use api_key: ${{VAR}}")
    try:
        return base_url(url)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error.message}") from None


def _from_file(path: Path, key: str) -> list[EndpointSpec]:
    if path.is_dir():
        return HostsFolder(path, key).read()
    try:
        text, trusted = path.read_text(encoding="utf-8-sig"), trusted_key(path, key)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        kind = NoEndpointError if isinstance(error, FileNotFoundError) else ConfigurationError
        raise kind(f"endpoints.file: {path}: cannot be read: {reason}") from None
    specs = parse_endpoints_file(text, str(path), trusted)
    for spec in specs:
        with_where(f"endpoints.file: {path}", spec.url)
    return specs


def _from_hosts(endpoints: EndpointsConfig, key: str) -> list[EndpointSpec]:
    texts = [_expand_variable(text, os.environ) for text in endpoints.hosts or ()]
    hosts = dict.fromkeys(h for text in texts for h in hosts_of(text, os.environ))
    trusted: ApiKey = key
    for text in texts:
        if "/" in text:
            trusted = trusted_key(Path(text).expanduser(), trusted)
    specs = hosts_to_specs(
        list(hosts),
        endpoints.port or _PORT,
        per_host=endpoints.per_host or 1,
        suffix=endpoints.suffix,
        api_key=trusted,
    )
    for spec in specs:
        with_where("endpoints.hosts", spec.url)
    return specs


def hosts_of(text: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the hosts that one entry of ``endpoints.hosts`` stands for.

    Args:
        text: A host, a Slurm list, a path (with a slash) of a node file, or ``$VARIABLE`` that
            holds one of these.
        environment: The variables.

    Raises:
        ConfigurationError: The variable is not set, the file cannot be read, or the list.
    """
    text = _expand_variable(text, environment)
    if "/" not in text:
        try:
            yield from expand_slurm(text)
        except ConfigurationError as error:
            raise ConfigurationError(f"endpoints.hosts: {error.message}") from None
        return
    try:
        hosts = parse_pbs(Path(text).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        msg = f"endpoints.hosts: {text}: cannot be read: {reason}"
        raise ConfigurationError(msg) from None
    if not hosts:
        raise ConfigurationError(f"endpoints.hosts: {text} names no host")
    yield from hosts


def _expand_variable(text: str, environment: Mapping[str, str]) -> str:
    """Return what a variable holds, or a text that names none as it is.

    Raises:
        ConfigurationError: The variable is not set.
    """
    if not text.startswith("$"):
        return text
    name = text[1:]
    if not environment.get(name):
        msg = (
            f"endpoints.hosts: the environment variable {name} is not set: it is there inside "
            "a job of the scheduler; elsewhere name the hosts"
        )
        raise ConfigurationError(msg)
    return environment[name]


HOST: Final = ("FANFOLD_HOST", "SLURMD_NODENAME")
"""Variables that name the node; the system is asked where none is set."""
NODES: Final = "FANFOLD_NODES"
"""Variable of a job's coordinator: how many nodes serve."""
_ADDRESS: Final = re.compile(r"[\d.]+|.*:.*")


def this_host(environment: Mapping[str, str] | None = None) -> str:
    """Return this node's name."""
    environment = os.environ if environment is None else environment
    return next((environment[name] for name in HOST if environment.get(name)), socket.gethostname())


def short_name(host: str) -> str:
    """Return a host's name without its domain, in small letters; an address as it is."""
    return host if _ADDRESS.fullmatch(host) else host.lower().partition(".")[0]


def starts_servers(config: RunConfig) -> bool:
    """Say whether fanfold starts the model servers.

    It does not where somebody else has: Aegis, by its registry or its endpoints file, a gateway, a
    simulated fleet, or what ``auto`` finds.
    """
    endpoints = config.endpoints
    if config.node.serve is None:
        return False
    if endpoints.file is not None:
        return not Path(endpoints.file).is_file()  # a folder is the servers folder
    return endpoints.hosts is not None or endpoints.urls is not None


def most_servers(config: RunConfig, environment: Mapping[str, str]) -> int | None:
    """Return how many servers of a job can be ready in the end; blocks.

    None where nobody says how many nodes the job has, or it does not serve.

    Args:
        config: The settings.
        environment: Variables of the coordinator.
    """
    nodes = environment.get(NODES, "")
    if not nodes.isdigit() or config.endpoints.file is None or not starts_servers(config):
        return None
    failed = sum(1 for _ in (Path(config.endpoints.file) / "logs").glob("*.failed"))
    return max(0, int(nodes) - failed) * config.node.instances


def serves_simulated(config: RunConfig) -> bool:
    """Say whether the command serves a simulated fleet, whose answers mean nothing."""
    return config.node.serve is not None and MODULE in shlex.split(config.node.serve)


def node_plan(
    config: RunConfig,
    folder: Path,
    host: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> NodePlan:
    """Return what is to be served on this node.

    Args:
        config: The settings.
        folder: The servers folder.
        host: The node's name; asked of the environment by default.
        environment: Variables; the process's own by default.

    Raises:
        ConfigurationError: Something is missing, or does not fit this node.
    """
    environment = os.environ if environment is None else environment
    node, host = config.node, host or this_host(environment)
    if node.serve is None:
        msg = "set node.serve: the command that serves the model, e.g. vllm serve … --port {port}"
        raise ConfigurationError(msg)
    if MASKED in node.serve:
        msg = (
            "node.serve: a run folder does not keep a secret that was written out; write it as "
            "${VAR} and set the variable on the nodes"
        )
        raise ConfigurationError(msg)
    words = split_command(node.serve, NAMES)
    told = node.accelerators
    ids = accelerator_ids(told.variable, told.ids, told.count, environment)
    named = names_of(words)
    if "model" in named and config.model.name is None:
        raise ConfigurationError("node.serve names {model}: set model.name")
    if "gpus" in named and not ids:
        raise ConfigurationError("node.serve names {gpus}: set node.accelerators")
    for name, value in node.env.items():
        if value == MASKED:
            msg = (
                f"node.env.{name}: a run folder does not keep a secret that was written out; give "
                f"it by a variable: --set 'node.env.{name}=${{VAR}}'"
            )
            raise ConfigurationError(msg)
    key = endpoints_key(config.endpoints)
    return NodePlan(
        host=short_name(host),
        address=node.address.replace("{host}", host),
        folder=str(folder.absolute()),
        servers=server_plans(
            words,
            ports=node.ports,
            instances=node.instances,
            variable=told.variable,
            ids=ids,
            env=node.env,
            model=config.model.name or "",
        ),
        ready=node.ready,
        timeout_s=node.timeout_s,
        restarts=node.restarts,
        linger_s=node.linger_s,
        key=None if key == "EMPTY" else key,
    )
