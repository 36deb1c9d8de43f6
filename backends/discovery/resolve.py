"""Where the model is served: from the settings to endpoints that can be asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ...configs.endpoints import EndpointsConfig, FirstConfig
from ..core.errors import ConfigurationError, NoEndpointError, RunStoppedError
from ..core.secrets import MASKED
from ..fleet.address import ApiKey, EndpointSpec, base_url
from .folder import HostsFolder
from .gateway import Gateway
from .membership import RegistrySource, Source
from .nodelist import expand_slurm, hosts_to_specs, parse_pbs
from .probe import Found, discover
from .sources import parse_endpoints_file, trusted_key
from .token import CommandToken

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
