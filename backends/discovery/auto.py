"""``endpoints: auto``: find endpoints near this process, and log which were chosen and why.

It never chooses a simulated fleet, nor a paid service that is known only by a variable that may be
set for another purpose.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from ...configs.endpoints import (
    AEGIS_FILE,
    AEGIS_REGISTRY_FILE,
    FIRST_URL,
    FirstConfig,
    explain_refused_fields,
)
from ...configs.models import RunConfig
from ..core.errors import ConfigurationError, MissingExtraError, RunStoppedError
from ..core.terminal import count_nouns
from ..fleet.endpoint import ApiKey, EndpointSpec, normalize_base_url
from .login import TOKEN_VARIABLE, read_login_token
from .probe import SelectedModel, select_model
from .resolve import (
    EndpointSet,
    check_setting_url,
    fit_requests,
    get_endpoints_key,
    get_gateway_url,
    make_gateway_set,
)
from .sources import FileSource, read_registry_file

_REGISTRY_FILES: Final = (AEGIS_REGISTRY_FILE, f"local_runs/{AEGIS_REGISTRY_FILE}")
_FILES: Final = (AEGIS_FILE, f"local_runs/{AEGIS_FILE}", "endpoints.txt")
PORTS: Final = tuple(range(8000, 8012))
"""Default port of vLLM, and ports of Aegis' instances on one node."""

_OLLAMA: Final = "http://127.0.0.1:11434"
_FIRST_PATH: Final = "sophia/vllm"
_QUICK_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One place that was searched: its endpoints, or why it has none."""

    name: str
    endpoint_set: EndpointSet | None = None
    reason: str = ""


async def choose_endpoints(
    config: RunConfig,
    environment: Mapping[str, str],
    folder: Path,
    ports: Sequence[int] | None = None,
) -> EndpointSet:
    """Return the first endpoints found that answer and serve the model.

    Tried in this order: the registry and the endpoints file of Aegis in the working directory (or
    ``endpoints.txt``), servers on this host, Ollama, and FIRST if its variables are
    set or the user has logged in.

    Args:
        config: The settings.
        environment: The process's variables.
        folder: The working directory.
        ports: Ports to probe on this host, in place of the usual ones.

    Raises:
        ConfigurationError: None fits; the message lists what was tried, and what to set.
    """
    reasons = []
    key = get_endpoints_key(config.endpoints)
    async for candidate in _candidates(key, environment, folder, ports or PORTS):
        endpoint_set, reason = candidate.endpoint_set, candidate.reason
        if endpoint_set is not None:
            fitting = await _probe_candidate(config, endpoint_set)
            if isinstance(fitting, EndpointSet):
                problem = explain_refused_fields(config.model.extra_body)
                if fitting.gateway is not None and problem is not None:
                    raise ConfigurationError(
                        f"model.extra_body: endpoints: auto chose {candidate.name}: {problem}"
                    )
                return replace(fitting, reason=f"auto chose {candidate.name}: {fitting.reason}")
            reason = fitting
        reasons.append(f"{candidate.name}: {reason}")
    raise ConfigurationError(_explain_none(reasons, environment))


async def _probe_candidate(config: RunConfig, endpoint_set: EndpointSet) -> EndpointSet | str:
    """Probe endpoints; return them with the results, or why they do not fit."""
    name = config.model.name or endpoint_set.model
    endpoint_set = fit_requests(endpoint_set, config)
    try:
        # what answers on a guessed address without a list of models may be no model server
        found = [replace(one, unlisted=False) for one in await endpoint_set.probe(_QUICK_S)]
        matched = select_model(found, name, config.endpoints.models)
    except ConfigurationError as error:
        return error.message
    if matched.simulated:
        return "a simulated fleet, which auto never chooses (name it in endpoints.file instead)"
    return replace(endpoint_set, probe_results=tuple(found), model=name, reason=_why(matched))


def _why(matched: SelectedModel) -> str:
    return f"{count_nouns(len(matched.specs), 'endpoint')} for {matched.model}"


async def _candidates(
    key: str, environment: Mapping[str, str], folder: Path, ports: Sequence[int]
) -> AsyncIterator[_Candidate]:
    for name in _REGISTRY_FILES:
        if await asyncio.to_thread((folder / name).is_file):
            yield await _registry(name, folder / name, key)
    for name in _FILES:
        if await asyncio.to_thread((folder / name).is_file):
            yield await _file(name, folder / name, key)
    yield await _this_host(ports, key)
    yield _ollama(environment)
    first = await _first(environment)
    if first is not None:
        yield first


async def _registry(name: str, path: Path, key: ApiKey) -> _Candidate:
    try:
        source = await asyncio.to_thread(read_registry_file, path, key)
        return _Candidate(
            f"the registry in {name}", EndpointSet(tuple(await source.list_endpoints()), source)
        )
    except ConfigurationError as error:
        return _Candidate(f"the registry in {name}", reason=error.message)


async def _file(name: str, path: Path, key: str) -> _Candidate:
    source = FileSource(path, key)
    try:
        return _Candidate(
            f"the file {name}", EndpointSet(tuple(await source.list_endpoints()), source)
        )
    except ConfigurationError as error:
        return _Candidate(f"the file {name}", reason=error.message)


async def _this_host(ports: Sequence[int], key: str) -> _Candidate:
    name = f"this host, ports {ports[0]} to {ports[-1]}"
    local = EndpointSet(tuple(EndpointSpec(f"http://127.0.0.1:{port}", key) for port in ports))
    up = [found for found in await local.probe(_QUICK_S) if found.reachable]
    if not up:
        return _Candidate(name, reason="no model server answers")
    return _Candidate(name, EndpointSet(tuple(f.spec for f in up), probe_results=tuple(up)))


def _ollama(environment: Mapping[str, str]) -> _Candidate:
    host = environment.get("OLLAMA_HOST") or _OLLAMA
    url = host if "://" in host else f"http://{host}"
    try:
        spec = EndpointSpec(check_setting_url("OLLAMA_HOST", url), "ollama")
    except ConfigurationError as error:
        return _Candidate("Ollama", reason=error.message)
    model = environment.get("OLLAMA_MODEL") or None
    return _Candidate(f"Ollama at {spec.url}", EndpointSet((spec,), model=model))


async def _first(environment: Mapping[str, str]) -> _Candidate | None:
    """Return FIRST, by the variables of its examples or a login; None: it is not used here."""
    given, address = environment.get(TOKEN_VARIABLE), environment.get("FIRST_API_BASE")
    if not given:
        try:
            await asyncio.to_thread(read_login_token)
        except MissingExtraError:
            return None
        except RunStoppedError as error:
            return _Candidate("FIRST", reason=error.message)
    elif not address:
        address = f"{FIRST_URL}/{_FIRST_PATH}/v1"
    try:
        first = FirstConfig(token=SecretStr(given) if given else None)
        if address:
            check_setting_url("FIRST_API_BASE", address)
            root, cluster, framework, _ = normalize_base_url(address).rsplit("/", 3)
            first = first.model_copy(update={"base_url": root, "paths": [f"{cluster}/{framework}"]})
        gateway = make_gateway_set(first, None)
        where = get_gateway_url(first, environment)
    except ConfigurationError as error:
        return _Candidate("FIRST", reason=error.message)
    except ValueError:
        reason = f"{TOKEN_VARIABLE} or FIRST_API_BASE is malformed"
        return _Candidate("FIRST", reason=reason)
    model = environment.get("FIRST_MODEL") or None
    return _Candidate(f"FIRST at {address or where}", replace(gateway, model=model))


def _explain_none(reasons: Sequence[str], environment: Mapping[str, str]) -> str:
    lines = ["endpoints: auto found no endpoints. Tried:", *(f"  {r}" for r in reasons)]
    lines.append(
        "Set endpoints.urls, endpoints.file, endpoints.hosts or endpoints.first; or start a "
        "server on this host; or log in to FIRST (alcf-tokens login), or set FIRST_API_KEY "
        "(with FIRST_API_BASE and FIRST_MODEL)."
    )
    if environment.get("OPENAI_API_KEY"):
        lines.append(
            "OPENAI_API_KEY is set, but a paid service is used only if it is configured: "
            "endpoints: {urls: [https://api.openai.com/v1], api_key: ${OPENAI_API_KEY}}"
        )
    return "\n".join(lines)
