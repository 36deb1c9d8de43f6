"""Ask endpoints which models they serve; select one model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ..core.connection_errors import describe_connection_error
from ..core.errors import ConfigurationError, NoEndpointError
from ..core.lazy_tls import aiohttp
from ..core.types import SIMULATED_FINGERPRINT
from ..core.values import parse_json
from ..fleet.endpoint import DeploymentState, Endpoint, EndpointSpec
from ..fleet.failures import BodyTooLargeError, ErrorBody, HTTPAnswer
from ..fleet.policy import FleetPolicy
from ..fleet.transport import Transport

_AT_ONCE: Final = 64
_OK: Final = 200
_UNLISTED: Final = frozenset({403, 404, 405, 501})
"""Statuses of servers and gateways that have no list of models."""
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Deployment:
    """One model behind a gateway.

    Attributes:
        model: The model's name there.
        state: Whether it runs, or None if unknown.
        tokens_per_min: Limit of tokens per minute of all users, or None if unknown.
        user_tokens_per_min: The same of one user.
    """

    model: str
    state: DeploymentState | None
    tokens_per_min: int | None
    user_tokens_per_min: int | None

    @property
    def limit(self) -> int | None:
        """Return the tokens per minute that one user may use, or None if unknown."""
        limits = (self.tokens_per_min, self.user_tokens_per_min)
        return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What one endpoint reports about itself.

    Attributes:
        spec: The endpoint.
        label: Its name, without credentials.
        models: Ids that it serves.
        max_model_len: Context length in tokens by model id, if the server reports it.
        simulated: Whether it is part of a simulated fleet.
        latency_s: Time to its answer in seconds, or None.
        error: Why it did not answer, or did not list its models, or None.
        unlisted: Whether it answers, but has no list of models: it is used for a given model.
        is_lenient: Whether its ids may differ from the model's name in what precedes the last
            slash, and in letter case.
        deployments: States and limits of its models, if it is behind a gateway.
    """

    spec: EndpointSpec
    label: str
    models: tuple[str, ...] = ()
    max_model_len: tuple[tuple[str, int], ...] = ()
    simulated: bool = False
    latency_s: float | None = None
    error: str | None = None
    unlisted: bool = False
    is_lenient: bool = False
    deployments: tuple[Deployment, ...] = ()

    @property
    def reachable(self) -> bool:
        """Return True if it answered with a list of models."""
        return self.error is None


async def probe_models(specs: Sequence[EndpointSpec], timeout_s: float = 5.0) -> list[ProbeResult]:
    """Ask every endpoint for its models, 64 at a time.

    Args:
        specs: The endpoints.
        timeout_s: Longest wait for one of them, in seconds.

    Returns:
        One result per endpoint, in the same order; unreachable ones have the reason in ``error``.

    Raises:
        ConfigurationError: A URL is malformed.
    """
    endpoints = [Endpoint(spec) for spec in specs]
    gate = asyncio.Semaphore(_AT_ONCE)
    transport = Transport(FleetPolicy())

    async def one(endpoint: Endpoint) -> ProbeResult:
        async with gate:
            return await _ask(transport, endpoint, timeout_s)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(endpoint)) for endpoint in endpoints]
    finally:
        await transport.aclose()
    return [task.result() for task in tasks]


async def _ask(transport: Transport, endpoint: Endpoint, timeout_s: float) -> ProbeResult:
    started = time.monotonic()
    try:
        answer = await transport.get(
            f"{endpoint.url}/models", await endpoint.headers(), timeout_s, endpoint.spec.proxied
        )
    except TimeoutError:
        return _make_unreachable(endpoint, f"no answer within {timeout_s:g} s")
    except aiohttp.ClientError as error:
        return _make_unreachable(endpoint, describe_error(error))
    models = _models(answer)
    if models is None:
        problem = f"HTTP {answer.status}: {ErrorBody.parse(answer.mask_keys().body).message}"
        found = _make_unreachable(endpoint, problem)
        return replace(found, unlisted=answer.status in _UNLISTED)
    return ProbeResult(
        endpoint.spec,
        endpoint.label,
        models=tuple(m["id"] for m in models),
        max_model_len=tuple(
            (m["id"], m["max_model_len"]) for m in models if isinstance(m.get("max_model_len"), int)
        ),
        simulated=any(m.get("owned_by") == SIMULATED_FINGERPRINT for m in models),
        latency_s=time.monotonic() - started,
    )


def _make_unreachable(endpoint: Endpoint, error: str) -> ProbeResult:
    return ProbeResult(endpoint.spec, endpoint.label, error=error)


def describe_error(error: aiohttp.ClientError) -> str:
    """Return why a request to an endpoint or a gateway failed."""
    reason = describe_connection_error(error)
    return reason if isinstance(error, BodyTooLargeError) else f"cannot connect: {reason}"


def _models(answer: HTTPAnswer) -> list[dict[str, Any]] | None:
    """Return the entries of a list of models, or None if the answer is not such a list."""
    if answer.status != _OK:
        return None
    try:
        document = parse_json(answer.body)
    except (ValueError, RecursionError):
        return None
    data = document.get("data") if isinstance(document, dict) else None
    if not isinstance(data, list):
        return None
    return [m for m in data if isinstance(m, dict) and isinstance(m.get("id"), str)]


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """Endpoints that fit the run.

    Attributes:
        model: The model's id.
        specs: Endpoints that serve it, and those that did not answer yet.
        simulated: Whether they are a simulated fleet.
        max_model_len: Smallest context length among them in tokens, or None if unknown.
        unreachable: Labels and reasons of those that did not answer.
    """

    model: str
    specs: tuple[EndpointSpec, ...]
    simulated: bool
    max_model_len: int | None
    unreachable: tuple[tuple[str, str], ...]


def check_models(found: Sequence[ProbeResult], name: str | None) -> CheckedModel:
    """Select one model and drop the endpoints that do not serve it.

    Args:
        found: Probe results of the endpoints.
        name: The configured model, or None for the only one that all serve.

    Raises:
        NoEndpointError: None is reachable.
        ConfigurationError: None serves the model, several models and no name, or simulated and real
            endpoints together.
    """
    found = assume_listed(found, name)
    there = [f for f in found if f.reachable]
    if not there:
        if any(f.unlisted for f in found):
            raise ConfigurationError(
                "set model.name: the endpoints do not list their models; "
                + "; ".join(f"{f.label}: {f.error}" for f in found[:_SHOWN])
            )
        reasons = "; ".join(f"{f.label}: {f.error}" for f in found[:_SHOWN])
        raise NoEndpointError(
            f"no endpoint answers: {reasons}. Check endpoints, or start the servers"
        )
    simulated = {f.simulated for f in there}
    if len(simulated) > 1:
        first = next(f.label for f in there if f.simulated)
        raise ConfigurationError(
            f"endpoints mixes simulated ({first}, …) and real servers; use either kind alone"
        )
    model = name or _only_model(there)
    serving = [f for f in there if f.spec.model or model in f.models]
    if not serving:
        raise ConfigurationError(
            f"no endpoint serves model.name {model!r}; served: {', '.join(_list_served(there))}"
        )
    lengths = [n for f in serving for m, n in f.max_model_len if m == (f.spec.model or model)]
    lost = [f for f in found if not f.reachable]
    return CheckedModel(
        model,
        tuple(_sized(f, model) for f in found if f in serving or f in lost),
        simulated.pop(),
        min(lengths, default=None),
        tuple((f.label, f.error or "") for f in lost),
    )


def assume_listed(found: Sequence[ProbeResult], name: str | None) -> list[ProbeResult]:
    """Assume that endpoints without a list of models serve the configured model."""
    if name is None:
        return list(found)
    return [
        replace(one, error=None, models=(one.spec.model or name,)) if one.unlisted else one
        for one in found
    ]


def _sized(found: ProbeResult, model: str) -> EndpointSpec:
    """Return an endpoint with the context length that it reported, unless one is configured."""
    length = dict(found.max_model_len).get(found.spec.model or model)
    return replace(found.spec, max_model_len=found.spec.max_model_len or length)


def _list_served(found: Sequence[ProbeResult]) -> list[str]:
    return sorted({m for f in found for m in f.models}) or ["nothing"]


def _only_model(found: Sequence[ProbeResult]) -> str:
    common = set[str](found[0].models).intersection(*(f.models for f in found))
    if len(common) == 1:
        return common.pop()
    raise ConfigurationError(
        f"set model.name: the endpoints serve {', '.join(_list_served(found))}"
        + ("" if common else ", and no model is served by all of them")
    )


_MODELS_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class SelectedModel:
    """Endpoints that fit the run, each with its own id of the model.

    Attributes:
        model: The model's name.
        specs: Endpoints that serve it, and those that did not answer yet.
        simulated: Whether they are a simulated fleet.
        absent: A line for each endpoint that did not answer, or is excluded.
        ready: How many answer and serve it.
    """

    model: str
    specs: tuple[EndpointSpec, ...]
    simulated: bool
    absent: tuple[str, ...]
    ready: int


def select_model(
    found: Sequence[ProbeResult], name: str | None, names: Mapping[str, str]
) -> SelectedModel:
    """Select one model, and find the id under which each endpoint serves it.

    An endpoint that its list tags with a model (``model=…``) is used for that model only.

    Args:
        found: Probe results of the endpoints.
        name: The model's name, or None for the only one that all serve.
        names: Served id to model's name, where they differ.

    Raises:
        ConfigurationError: No endpoint answers, none serves the model, the model is not settled, or
            simulated and real endpoints are mixed.
    """
    found = assume_listed(found, name)
    names = _match_leniently(found, name, names)
    settled = check_models([_translate_ids(one, names) for one in found], name)
    matches = [_match_endpoint(one, names, settled.model) for one in found]
    return SelectedModel(
        settled.model,
        tuple(spec for spec in matches if spec is not None),
        settled.simulated,
        tuple(_absent(found, matches, settled.model)),
        sum(s is not None and one.reachable for one, s in zip(found, matches, strict=True)),
    )


def simplify_model(name: str) -> str:
    """Return what a model's name has in common on all clusters of a gateway."""
    return name.strip().rpartition("/")[2].lower()


def _match_leniently(
    found: Sequence[ProbeResult], name: str | None, names: Mapping[str, str]
) -> Mapping[str, str]:
    """Return ``names`` with the ids that differ from a model's name only in form.

    An endpoint with several such ids has none: it is not clear which one is meant.
    """
    if name is None:
        return names
    more = dict[str, str]()
    for one in found:
        if one.is_lenient and not any(i == name or names.get(i) == name for i in one.models):
            alike = [i for i in one.models if simplify_model(i) == simplify_model(name)]
            more |= dict.fromkeys(alike if len(alike) == 1 else (), name)
    return more | dict(names)


def _translate_ids(found: ProbeResult, names: Mapping[str, str]) -> ProbeResult:
    """Replace the served ids by the run's names."""
    return replace(
        found,
        spec=replace(found.spec, model=None),
        models=tuple(dict.fromkeys(names.get(i, i) for i in _list_offered(found))),
    )


def _list_offered(found: ProbeResult) -> list[str]:
    return [i for i in found.models if found.spec.model in {None, i}]


def _match_endpoint(
    found: ProbeResult, names: Mapping[str, str], model: str
) -> EndpointSpec | None:
    """Return the endpoint with its id of the model, or None if it does not serve it."""
    offered = _list_offered(found)
    if not found.reachable and not found.models:
        offered = [model if found.spec.model is None else found.spec.model]
    fitting = [i for i in offered if i == model] or [i for i in offered if names.get(i) == model]
    if not fitting:
        return None
    served = fitting[0]
    length = dict(found.max_model_len).get(served)
    return replace(
        found.spec,
        model=None if served == model else served,
        max_model_len=found.spec.max_model_len or length,
    )


def _absent(
    found: Sequence[ProbeResult], matches: Sequence[EndpointSpec | None], model: str
) -> Iterator[str]:
    for one, spec in zip(found, matches, strict=True):
        if spec is None:
            serves = ", ".join(one.models[:_MODELS_SHOWN]) or one.spec.model or "nothing"
            tag = f" (tagged {one.spec.model})" if one.spec.model else ""
            yield f"{one.label} excluded: it serves {serves}{tag}, not {model}"
        elif one.error:
            yield f"{one.label} does not answer yet: {one.error}"
