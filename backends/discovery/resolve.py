"""From settings to endpoints that can be probed, and to a node's server plan."""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...configs.backend import COMMAND_FIELDS
from ...configs.base import expand_home
from ...configs.endpoints import FIRST_URL, EndpointsConfig, FirstConfig
from ...configs.models import RunConfig
from ..core.errors import ConfigurationError, NoEndpointError, RunStoppedError
from ..core.request_urls import GATEWAY_URLS
from ..core.secrets import MASKED
from ..core.templates import find_names, split_command
from ..fleet.endpoint import ApiKey, EndpointSpec, merge_spellings, normalize_base_url
from ..simulated.process import MODULE
from .gateway import Gateway
from .login import CommandToken, LoginToken
from .probe import ProbeResult, probe_models
from .sources import (
    EndpointSource,
    HostsFolder,
    RegistrySource,
    expand_slurm,
    find_registry_file,
    get_trusted_key,
    hosts_to_specs,
    locate_file,
    parse_endpoints_file,
    parse_pbs,
    read_registry_file,
)

if TYPE_CHECKING:
    from ..servers.plan import NodePlan

PROBE_TIMEOUT_S: Final = 5.0
GATEWAY_VARIABLE: Final = "inference_base_url"
"""Variable of the facility's own tools that names another FIRST gateway."""
_PORT: Final = 8000
"""Default port of vLLM, and of Aegis' first instance on a node."""


@dataclass(frozen=True, slots=True)
class EndpointSet:
    """Endpoints that may serve the model, and where their list comes from.

    Attributes:
        specs: The endpoints.
        source: Their list, if it may change during a run.
        gateway: The gateway that they are behind, or None for nodes.
        requests_per_s: The gateway's quota, or None.
        probe_results: Results of a probe, if they were probed already.
        model: The model's name, if the environment sets it and the settings do not.
        reason: What ``auto`` or the choice among a gateway's deployments chose, or None.
    """

    specs: tuple[EndpointSpec, ...]
    source: EndpointSource | None = None
    gateway: Gateway | None = None
    requests_per_s: float | None = None
    probe_results: tuple[ProbeResult, ...] | None = None
    model: str | None = None
    reason: str | None = None

    @property
    def is_fixed(self) -> bool:
        """Return True if the settings list the endpoints themselves."""
        return self.source is None and self.gateway is None and self.reason is None

    async def probe(self, timeout_s: float = PROBE_TIMEOUT_S) -> list[ProbeResult]:
        """Probe the endpoints, unless that was done already.

        Raises:
            ConfigurationError: The gateway's token cannot be fetched.
        """
        if self.probe_results is not None:
            return list(self.probe_results)
        if self.gateway is None:
            return await probe_models(self.specs, timeout_s)
        try:
            return await self.gateway.probe_models(2 * timeout_s)
        except RunStoppedError as error:
            raise ConfigurationError(error.message) from None


def list_endpoint_specs(
    endpoints: EndpointsConfig, written: Mapping[str, Any]
) -> list[EndpointSpec]:
    """Return the endpoints that the settings name, without sending a request.

    A registry, ``auto`` and a gateway without ``paths`` name none, nor does a file of Aegis that is
    not written yet.

    Args:
        endpoints: The settings, variables expanded.
        written: The same as the user wrote them: this may be shown.

    Raises:
        ConfigurationError: None given, a malformed URL, an unreadable file, no key.
    """
    key = get_endpoints_key(endpoints)
    if endpoints.auto or endpoints.aegis_registry is not None:
        return []
    if endpoints.first is not None:
        return list(_gateway(endpoints.first, endpoints.proxy).specs)
    if endpoints.file is not None:
        if (registry := find_registry_file(Path(endpoints.file))) is not None:
            read_registry_file(registry)
            return []
        specs = _from_file(locate_file(Path(endpoints.file)), key)
    elif endpoints.hosts is not None:
        specs = _from_hosts(endpoints, key)
    else:
        specs = _from_urls(endpoints, written, key)
    return [replace(spec, proxied=bool(endpoints.proxy)) for spec in specs]


def check_endpoint_set(endpoints: EndpointsConfig, written: Mapping[str, Any]) -> None:
    """Check the endpoint settings without sending a request.

    Raises:
        ConfigurationError: Something is malformed, or cannot be read.
    """
    if endpoints.aegis_registry is not None:
        open_registry(endpoints)
    elif not endpoints.auto:
        try:
            list_endpoint_specs(endpoints, written)
        except NoEndpointError:
            if not endpoints.waits_for_endpoints:
                raise


def make_gateway_set(first: FirstConfig, proxy: bool | None) -> EndpointSet:
    """Return the deployments behind a gateway."""
    gateway = _gateway(first, proxy)
    return EndpointSet(gateway.specs, gateway=gateway, requests_per_s=first.requests_per_s)


def fit_requests(endpoint_set: EndpointSet, config: RunConfig) -> EndpointSet:
    """Return endpoints for the requests of a run; a deployment must offer a URL of theirs."""
    gateway = endpoint_set.gateway
    if gateway is None or not config.input.is_batch:
        return endpoint_set
    return replace(endpoint_set, gateway=replace(gateway, urls=GATEWAY_URLS))


def get_endpoints_key(endpoints: EndpointsConfig) -> str:
    """Return the key of all endpoints.

    Raises:
        ConfigurationError: The key was given literally, so the run folder does not store it.
    """
    key = endpoints.api_key.get_secret_value()
    if key == MASKED:
        raise ConfigurationError(_explain_masked("endpoints.api_key"))
    return key


def _explain_masked(where: str) -> str:
    return (
        f"{where}: a run folder does not store a key that was given literally; give it "
        f"again, preferably by a variable: --set '{where}=${{VAR}}'"
    )


def open_registry(endpoints: EndpointsConfig) -> RegistrySource:
    """Return the source for Aegis' registry.

    Raises:
        ConfigurationError: Its URL is malformed.
    """
    url = endpoints.aegis_registry or ""
    check_setting_url("endpoints.aegis_registry", url)
    return RegistrySource(url, get_endpoints_key(endpoints))


def _gateway(first: FirstConfig, proxy: bool | None) -> Gateway:
    key: ApiKey
    if first.token_command is not None:
        key = CommandToken(first.token_command, "endpoints.first.token_command")
    elif first.token is not None:
        key = first.token.get_secret_value()
        if key == MASKED:
            raise ConfigurationError(_explain_masked("endpoints.first.token"))
    else:
        key = LoginToken("endpoints.first")
    base = get_gateway_url(first, os.environ)
    try:
        gateway = Gateway.from_paths(base, first.paths, key, proxy is not False)
    except ConfigurationError as error:
        raise ConfigurationError(f"endpoints.first.paths: {error.message}") from None
    return replace(
        gateway,
        tokens_per_min=first.tokens_per_min,
        window_s=first.window_s,
        poll_s=first.poll_s,
        start_wait_s=first.start_wait_s,
    )


def get_gateway_url(first: FirstConfig, environment: Mapping[str, str]) -> str:
    """Return the address of a gateway: the configured one, the variable's, or ALCF's.

    Raises:
        ConfigurationError: It is malformed; the message names the setting or the variable.
    """
    if first.base_url is not None:
        url, where = first.base_url, "endpoints.first.base_url"
    else:
        url, where = environment.get(GATEWAY_VARIABLE) or FIRST_URL, GATEWAY_VARIABLE
    check_setting_url(where, url)
    return url


def _from_urls(
    endpoints: EndpointsConfig, written: Mapping[str, Any], key: str
) -> list[EndpointSpec]:
    if not endpoints.urls:
        msg = "endpoints.urls is empty; give base URLs such as http://node17:8000/v1"
        raise ConfigurationError(msg)
    shown = written.get("urls") or endpoints.urls
    for n, url in enumerate(endpoints.urls):
        check_setting_url(f"endpoints.urls.{n}", url)
    return merge_spellings(
        EndpointSpec(url, key, label=text if "${" in text else None)
        for url, text in zip(endpoints.urls, shown, strict=True)
    )


def check_setting_url(where: str, url: str) -> str:
    """Return a normalized base URL.

    Raises:
        ConfigurationError: It is malformed, or contains a password; the message names the setting.
    """
    if "@" in url.partition("//")[2].partition("/")[0]:
        raise ConfigurationError(f"{where}: no user or password in a URL; use api_key: ${{VAR}}")
    try:
        return normalize_base_url(url)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error.message}") from None


def _from_file(path: Path, key: str) -> list[EndpointSpec]:
    if path.is_dir():
        return HostsFolder(path, key).read()
    try:
        text, trusted = path.read_text(encoding="utf-8-sig"), get_trusted_key(path, key)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        kind = NoEndpointError if isinstance(error, FileNotFoundError) else ConfigurationError
        raise kind(f"endpoints.file: {path}: cannot be read: {reason}") from None
    specs = parse_endpoints_file(text, str(path), trusted)
    for spec in specs:
        check_setting_url(f"endpoints.file: {path}", spec.url)
    return specs


def _from_hosts(endpoints: EndpointsConfig, key: str) -> list[EndpointSpec]:
    texts = [_expand_variable(text, os.environ) for text in endpoints.hosts or ()]
    hosts = dict.fromkeys(h for text in texts for h in expand_hosts(text, os.environ))
    trusted: ApiKey = key
    for text in texts:
        if "/" in text:
            trusted = get_trusted_key(expand_home(text), trusted)
    specs = hosts_to_specs(
        list(hosts),
        endpoints.port or _PORT,
        per_host=endpoints.per_host or 1,
        suffix=endpoints.suffix,
        api_key=trusted,
    )
    for spec in specs:
        check_setting_url("endpoints.hosts", spec.url)
    return merge_spellings(specs)


def expand_hosts(text: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the hosts that one entry of ``endpoints.hosts`` stands for.

    Args:
        text: A host, a Slurm list, a path (with a slash) of a node file, or ``$VARIABLE`` that
            holds one of these.
        environment: The variables.

    Raises:
        ConfigurationError: The variable is not set, or the file or the list cannot be read.
    """
    text = _expand_variable(text, environment)
    if "/" not in text:
        try:
            yield from expand_slurm(text)
        except ConfigurationError as error:
            raise ConfigurationError(f"endpoints.hosts: {error.message}") from None
        return
    try:
        hosts = parse_pbs(expand_home(text).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        msg = f"endpoints.hosts: {text}: cannot be read: {reason}"
        raise ConfigurationError(msg) from None
    if not hosts:
        raise ConfigurationError(f"endpoints.hosts: {text} lists no host")
    yield from hosts


def _expand_variable(text: str, environment: Mapping[str, str]) -> str:
    """Return the value of a variable, or the text unchanged if it names no variable.

    Raises:
        ConfigurationError: The variable is not set.
    """
    if not text.startswith("$"):
        return text
    name = text[1:]
    if not environment.get(name):
        msg = (
            f"endpoints.hosts: the environment variable {name} is not set: the scheduler sets it "
            "inside a job; outside a job list the hosts"
        )
        raise ConfigurationError(msg)
    return environment[name]


HOST_VARIABLES: Final = ("FANFOLD_HOST", "SLURMD_NODENAME")
"""Variables that name the node; if none is set, the system's host name is used."""
NODES_VARIABLE: Final = "FANFOLD_NODES"
"""Variable of a job's coordinator: how many nodes serve."""
_ADDRESS: Final = re.compile(r"[\d.]+|.*:.*")


def get_host_name(environment: Mapping[str, str] | None = None) -> str:
    """Return this node's name."""
    environment = os.environ if environment is None else environment
    return next(
        (environment[name] for name in HOST_VARIABLES if environment.get(name)),
        socket.gethostname(),
    )


def shorten_host(host: str) -> str:
    """Return a host's name without its domain, in lower case; an address is unchanged."""
    return host if _ADDRESS.fullmatch(host) else host.lower().partition(".")[0]


def has_own_servers(config: RunConfig) -> bool:
    """Return True if fanfold starts the model servers.

    It does not if the servers come from Aegis (by its registry or its endpoints file), a gateway, a
    simulated fleet, or ``auto``.
    """
    endpoints = config.endpoints
    if config.node.serve is None:
        return False
    if endpoints.file is not None:
        path = Path(endpoints.file)  # a folder is the servers folder, unless Aegis writes to it
        return not locate_file(path).is_file() and find_registry_file(path) is None
    return endpoints.hosts is not None or endpoints.urls is not None


def count_possible_servers(config: RunConfig, environment: Mapping[str, str]) -> int | None:
    """Return how many servers of a job can become ready at most; blocks.

    Returns None if the job's number of nodes is unknown, or if the job does not serve.

    Args:
        config: The settings.
        environment: Variables of the coordinator.
    """
    nodes = environment.get(NODES_VARIABLE, "")
    if not nodes.isdigit() or config.endpoints.file is None or not has_own_servers(config):
        return None
    failed = sum(1 for _ in (Path(config.endpoints.file) / "logs").glob("*.failed"))
    return max(0, int(nodes) - failed) * config.node.instances


def is_simulated_command(config: RunConfig) -> bool:
    """Return True if the command serves a simulated fleet, whose answers are meaningless."""
    return config.node.serve is not None and MODULE in shlex.split(config.node.serve)


def make_node_plan(
    config: RunConfig,
    folder: Path,
    host: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> NodePlan:
    """Return the servers to run on this node.

    Args:
        config: The settings.
        folder: The servers folder.
        host: The node's name; by default from the environment.
        environment: Variables; by default those of the process.

    Raises:
        ConfigurationError: A setting is missing, or does not fit this node.
    """
    from ..servers.plan import (  # noqa: PLC0415 - for nodes whose servers fanfold starts
        NodePlan,
        list_accelerators,
        plan_servers,
    )

    environment = os.environ if environment is None else environment
    node, host = config.node, host or get_host_name(environment)
    if node.serve is None:
        msg = "set node.serve: the command that serves the model, e.g. vllm serve … --port {port}"
        raise ConfigurationError(msg)
    if MASKED in node.serve:
        msg = (
            "node.serve: a run folder does not store a secret that was given literally; write it "
            "as ${VAR} and set the variable on the nodes"
        )
        raise ConfigurationError(msg)
    words = split_command(node.serve, COMMAND_FIELDS)
    accelerators = node.accelerators
    ids = list_accelerators(
        accelerators.variable, accelerators.ids, accelerators.count, environment
    )
    named = find_names(words)
    if "model" in named and config.model.name is None:
        raise ConfigurationError("node.serve contains {model}: set model.name")
    if "gpus" in named and not ids:
        raise ConfigurationError("node.serve contains {gpus}: set node.accelerators")
    for name, value in node.env.items():
        if value == MASKED:
            msg = (
                f"node.env.{name}: a run folder does not store a secret that was given literally; "
                f"give it by a variable: --set 'node.env.{name}=${{VAR}}'"
            )
            raise ConfigurationError(msg)
    key = get_endpoints_key(config.endpoints)
    return NodePlan(
        host=shorten_host(host),
        address=node.address.replace("{host}", host),
        folder=str(folder.absolute()),
        servers=plan_servers(
            words,
            ports=node.ports,
            instances=node.instances,
            variable=accelerators.variable,
            ids=ids,
            env=node.env,
            model=config.model.name or "",
        ),
        ready=node.ready,
        timeout_s=node.timeout_s,
        restarts=node.restarts,
        linger_s=node.linger_s,
        key=None if key == "EMPTY" else key,
        model=config.model.name or "",
    )
