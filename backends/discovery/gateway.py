"""The FIRST gateway: which deployments it has, their states and limits."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import orjson

from ..core.errors import ConfigurationError, FanfoldError, NoEndpointError
from ..core.lazy_tls import aiohttp
from ..core.types import CHAT_URL
from ..core.waits import pause_after
from ..fleet.endpoint import (
    ApiKey,
    DeploymentState,
    Endpoint,
    EndpointSpec,
    normalize_base_url,
)
from ..fleet.failures import ErrorBody, HTTPAnswer
from ..fleet.policy import FleetPolicy, RetryPolicy
from ..fleet.transport import Transport
from .probe import Deployment, ProbeResult, describe_error, simplify_model

_OK: Final = 200
_UNAUTHORIZED: Final = 401
_NOT_FOUND: Final = 404
_TOO_MANY: Final = 429
_PATH: Final = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
_TRIES: Final = 12
_WAIT: Final = RetryPolicy(refusal_pause_s=1.1, backoff_max_s=15.0).refusal_wait
"""Pauses after a refusal for too many requests: the gateway counts them by the second, and many
workers may ask at once."""
DEFAULT_TOKENS: Final = 60_000.0
"""Tokens of a model per minute that the gateway allows a user, unless it reports another limit."""
WAKE_AGAIN_S: Final = 600.0
"""For so many seconds after a request for a model that does not run, others are refused."""
_LOGIN: Final = "log in again (alcf-tokens login), or correct the token"


@dataclass(frozen=True, slots=True)
class Gateway:
    """Deployments behind one gateway.

    Attributes:
        base: Its address, without cluster and framework.
        key: The token, or where it comes from.
        paths: ``cluster/framework`` of each deployment to use; None: all that serve the model.
        proxied: Whether the environment's proxy variables apply.
        tokens_per_min: Limit of tokens of a model per window; None: the reported one.
        window_s: Length of a window in seconds.
        poll_s: Seconds for which the gateway keeps its list of jobs.
        start_wait_s: Longest wait for a model that does not run, in seconds.
        urls: URLs of the requests, of which a deployment must offer one.
    """

    base: str
    key: ApiKey = field(repr=False)
    paths: tuple[str, ...] | None = None
    proxied: bool = True
    tokens_per_min: float | None = None
    window_s: float = 60.0
    poll_s: float = 60.0
    start_wait_s: float = 7200.0
    urls: tuple[str, ...] = (CHAT_URL,)
    jobs: dict[str, tuple[float, Any]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_paths(
        cls, base: str, paths: Sequence[str] | None, key: ApiKey, proxied: bool = True
    ) -> Gateway:
        """Build a gateway, and check its address and paths.

        Args:
            base: The gateway's address.
            paths: ``cluster/framework`` of each deployment, or None.
            key: The token, or where it comes from.
            proxied: Whether the environment's proxy variables apply.

        Raises:
            ConfigurationError: The address or a path is malformed.
        """
        root = normalize_base_url(base.rstrip("/")).removesuffix("/v1")
        for path in paths or ():
            if not _PATH.fullmatch(path):
                msg = f"{path!r} is not a cluster/framework path, such as sophia/vllm"
                raise ConfigurationError(msg)
        return cls(root, key, None if paths is None else tuple(dict.fromkeys(paths)), proxied)

    @property
    def specs(self) -> tuple[EndpointSpec, ...]:
        """One endpoint for each configured path, with the label ``cluster/framework``."""
        return tuple(map(self.make_spec, self.paths or ()))

    def make_spec(self, path: str) -> EndpointSpec:
        """Return the endpoint of a deployment."""
        return EndpointSpec(
            f"{self.base}/{path}/v1",
            self.key,
            label=path,
            tokens_per_min=self.tokens_per_min or DEFAULT_TOKENS,
            window_s=self.window_s,
            proxied=self.proxied,
        )

    async def probe_models(self, timeout_s: float = 10.0) -> list[ProbeResult]:
        """Ask which models the deployments serve, in which state they are, and their limits.

        Args:
            timeout_s: Longest wait for one answer, in seconds.

        Returns:
            One result per deployment.

        Raises:
            NoEndpointError: The gateway does not answer, or is under maintenance.
            ConfigurationError: It is of a kind that is not supported.
            FanfoldError: The token cannot be fetched.
        """
        client = GatewayClient(self, timeout_s)
        try:
            up = await self._check_maintenance(client)
            answer: HTTPAnswer | None = None
            for route, discover in _KINDS:
                answer = await client.get(route)
                document = _read_json(answer)
                if document is not None:
                    return await discover(self, client, document, up)
                if answer.status != _NOT_FOUND:
                    break
        except TimeoutError:
            return self.make_unreachable(f"no answer within {timeout_s:g} s")
        except aiohttp.ClientError as error:
            return self.make_unreachable(describe_error(error))
        finally:
            await client.aclose()
        assert answer is not None, "there is a kind"
        return self.make_unreachable(_describe_refusal(answer))

    async def _check_maintenance(self, client: GatewayClient) -> Mapping[str, Any]:
        """Return which clusters are up, as far as the gateway says so; no token is needed.

        Raises:
            NoEndpointError: None of those that are to be used is.
        """
        up = _read_json(await client.get("status", with_token=False))
        if not isinstance(up, dict):
            return {}
        used = {path.partition("/")[0] for path in self.paths} if self.paths else up.keys()
        if used and all(up.get(cluster) is False for cluster in used):
            names = ", ".join(sorted(used))
            msg = f"{self.base}: under maintenance: {names}; try again later"
            raise NoEndpointError(msg)
        return up

    def make_unreachable(self, error: str) -> list[ProbeResult]:
        """Return that the configured deployments do not answer.

        Raises:
            NoEndpointError: None is configured.
        """
        if self.paths is None:
            raise NoEndpointError(f"{self.base}: {error}")
        return [ProbeResult(spec, spec.label or spec.url, error=error) for spec in self.specs]

    def make_members(
        self, found: Sequence[ProbeResult], specs: Sequence[EndpointSpec], model: str
    ) -> tuple[EndpointSpec, ...]:
        """Return the members of a fleet: first those that run, then those that have to start.

        Args:
            found: Results of a probe.
            specs: The deployments that serve the model.
            model: The model's name.
        """
        known = {(one.spec.url, about.model): about for one in found for about in one.deployments}
        members = []
        for spec in specs:
            served = spec.model or model
            about = known.get((spec.url, served))
            state = None if about is None else about.state
            watch = JobWatch(self, spec.label or "", served)
            member = replace(spec, probe_model=served, watch=watch)
            if self.tokens_per_min is None and about is not None and about.limit is not None:
                member = replace(member, tokens_per_min=about.limit)
            members.append((_ORDER.index(state), replace(member, state=state)))
        return tuple(spec for _, spec in sorted(members, key=lambda pair: pair[0]))

    def pack_members(
        self, members: Sequence[EndpointSpec], model: str
    ) -> list[dict[str, str | float | None]]:
        """Return the members of a fleet as JSON, without address and token."""
        return [
            {
                "path": spec.label,
                "model": spec.model or model,
                "state": None if spec.state is None else spec.state.value,
                "tokens_per_min": spec.tokens_per_min,
                "max_model_len": spec.max_model_len,
            }
            for spec in members
        ]

    def unpack_members(
        self, packed: Sequence[Mapping[str, Any]], model: str
    ) -> tuple[EndpointSpec, ...]:
        """Return the members of a fleet from the output of `pack_members`.

        Raises:
            ConfigurationError: It is malformed.
        """
        members = []
        for one in packed:
            path, served, state = str(one.get("path")), str(one.get("model")), one.get("state")
            if not _PATH.fullmatch(path) or state not in {
                None,
                *(s.value for s in DeploymentState),
            }:
                msg = f"the task's deployment {path!r} ({state}) is malformed"
                raise ConfigurationError(msg)
            members.append(
                replace(
                    self.make_spec(path),
                    model=None if served == model else served,
                    tokens_per_min=one.get("tokens_per_min"),
                    max_model_len=one.get("max_model_len"),
                    probe_model=served,
                    state=None if state is None else DeploymentState(state),
                    watch=JobWatch(self, path, served),
                )
            )
        return tuple(members)


_ORDER: Final = (
    DeploymentState.RUNNING,
    None,
    DeploymentState.STARTING,
    DeploymentState.QUEUED,
    DeploymentState.COLD,
)


def describe_members(specs: Sequence[EndpointSpec]) -> str:
    """Return one line about the deployments of a fleet: state, and name of the model."""
    return ", ".join(
        f"{spec.label}"
        + (f" ({spec.state.value})" if spec.state is not None else "")
        + (f" as {spec.model}" if spec.model is not None else "")
        for spec in specs
    )


class GatewayClient:
    """Requests to a gateway about itself.

    Args:
        gateway: The gateway.
        timeout_s: Longest wait for one answer, in seconds.

    Attributes:
        latency_s: Time to the last answer, in seconds.
    """

    def __init__(self, gateway: Gateway, timeout_s: float) -> None:
        self.latency_s = 0.0
        self._gateway = gateway
        self._timeout_s = timeout_s
        self._transport = Transport(FleetPolicy())
        self._endpoint = Endpoint(gateway.make_spec("any/any"))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    async def get(self, route: str, *, with_token: bool = True) -> HTTPAnswer:
        """Fetch a document; repeat the request with a new token, or later, if that helps.

        Args:
            route: The route below the gateway's address.
            with_token: Whether the route needs the token.

        Raises:
            aiohttp.ClientError: The connection failed or broke.
            TimeoutError: No answer in time.
            FanfoldError: The token cannot be fetched.
        """
        answer = await self._get(route, with_token)
        refused = answer.status == _UNAUTHORIZED and with_token
        if refused and await self._endpoint.renew_key(await self._endpoint.headers()):
            answer = await self._get(route, with_token)
        for tries in range(1, _TRIES + 1):
            if answer.status != _TOO_MANY:
                break
            await asyncio.sleep(pause_after(_WAIT, tries))
            answer = await self._get(route, with_token)
        return answer

    async def _get(self, route: str, with_token: bool) -> HTTPAnswer:
        headers = await self._endpoint.headers() if with_token else {}
        url, started = f"{self._gateway.base}/{route}", time.monotonic()
        answer = await self._transport.get(url, headers, self._timeout_s, self._gateway.proxied)
        self.latency_s = time.monotonic() - started
        return answer

    async def read_models(self, cluster: str) -> Any:
        """Return limits and capabilities of a cluster's models, or None without such a list.

        Raises:
            aiohttp.ClientError: The connection failed or broke.
            TimeoutError: No answer in time.
            FanfoldError: The token cannot be fetched.
        """
        return _read_json(await self.get(f"{cluster}/models"))

    async def read_jobs(self, cluster: str) -> Any:
        """Return the jobs of a cluster, or None if the gateway does not list them.

        Raises:
            aiohttp.ClientError: The connection failed or broke.
            TimeoutError: No answer in time.
            FanfoldError: The token cannot be fetched.
        """
        read_at, jobs = self._gateway.jobs.get(cluster, (float("-inf"), None))
        if time.monotonic() - read_at >= 0.9 * self._gateway.poll_s:
            jobs = _read_json(await self.get(f"{cluster}/jobs"))
            self._gateway.jobs[cluster] = time.monotonic(), jobs
        return jobs


@dataclass(frozen=True, slots=True)
class JobWatch:
    """The state of one model, as the gateway's list of jobs shows it.

    Attributes:
        gateway: The gateway.
        path: ``cluster/framework``.
        model: The model's name there.
    """

    gateway: Gateway
    path: str
    model: str

    @property
    def poll_s(self) -> float:
        """Return the seconds between two reads: the gateway answers from a cache meanwhile."""
        return self.gateway.poll_s

    @property
    def start_wait_s(self) -> float:
        """Return the longest wait for the model's start, in seconds."""
        return self.gateway.start_wait_s

    @property
    def wake_again_s(self) -> float:
        """Return the seconds after which another request may wake the model."""
        return WAKE_AGAIN_S

    @property
    def starts_models(self) -> bool:
        """Return True: a request of this process starts the model."""
        return True

    async def report_stopped(self) -> None:
        """Do nothing: this process starts the model itself."""

    async def read_state(self) -> DeploymentState | None:
        """Return the state now, or None if it is unknown."""
        client = GatewayClient(self.gateway, 30.0)
        cluster, _, framework = self.path.partition("/")
        try:
            return find_state(await client.read_jobs(cluster), framework, self.model)
        except (aiohttp.ClientError, TimeoutError, FanfoldError):
            return None
        finally:
            await client.aclose()


def _read_json(answer: HTTPAnswer) -> Any:
    """Return the JSON value of a good answer, or None."""
    if answer.status != _OK:
        return None
    try:
        return orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return None


def _describe_refusal(answer: HTTPAnswer) -> str:
    error = ErrorBody.parse(answer.mask_keys().body)
    hint = f" ({_LOGIN})" if answer.status == _UNAUTHORIZED else ""
    if error.html:
        hint = " (the answer is a web page: check base_url and any proxy)"
    return f"HTTP {answer.status}: {error.message}{hint}"


DiscoverFunction: TypeAlias = Callable[
    [Gateway, GatewayClient, Any, Mapping[str, Any]], Awaitable[list[ProbeResult]]
]
"""Lists the deployments of a gateway from the first document that only its kind has."""


async def discover_first(
    gateway: Gateway, client: GatewayClient, document: Any, up: Mapping[str, Any]
) -> list[ProbeResult]:
    """List the deployments of a FIRST gateway, with state and limits of their models."""
    offers, latency_s = dict(_list_offers(document, gateway.urls)), client.latency_s
    if not offers:
        return gateway.make_unreachable("list-endpoints lists no deployment")
    chosen = gateway.paths or [path for path, models in offers.items() if models is not None]
    urls = " or ".join(gateway.urls)
    if not chosen:
        return gateway.make_unreachable(f"no deployment offers {urls}")
    jobs, details = dict[str, Any](), dict[str, Any]()
    for cluster in dict.fromkeys(path.partition("/")[0] for path in chosen if offers.get(path)):
        jobs[cluster] = await client.read_jobs(cluster)
        details[cluster] = await client.read_models(cluster)
    results = []
    for path in chosen:
        cluster, _, framework = path.partition("/")
        spec, models = gateway.make_spec(path), offers.get(path)
        if path not in offers:
            known = f"the gateway has {', '.join(offers)}"
            results.append(ProbeResult(spec, path, error=known))
        elif models is None:
            results.append(ProbeResult(spec, path, error=f"the deployment offers no {urls}"))
        else:
            about = _index_details(details.get(cluster), framework)
            result = ProbeResult(
                spec,
                path,
                models,
                tuple((m, n) for m in models if (n := _read_context(about.get(m))) is not None),
                latency_s=latency_s,
                is_lenient=True,
                deployments=tuple(
                    Deployment(
                        m,
                        find_state(jobs.get(cluster), framework, m),
                        _read_limit(about.get(m), "rate_limit_token_per_minute"),
                        _read_limit(about.get(m), "rate_limit_token_per_minute_per_user"),
                    )
                    for m in models
                ),
            )
            if up.get(cluster) is False:
                result = replace(result, error=f"cluster {cluster} is under maintenance")
            results.append(result)
    return results


async def refuse_successor(
    gateway: Gateway, _client: GatewayClient, _document: Any, _up: Mapping[str, Any]
) -> list[ProbeResult]:
    """Refuse the successor of the FIRST gateway, which has other routes and limits."""
    raise ConfigurationError(
        f"{gateway.base} is the successor of the FIRST gateway (with /catalog and /deployments in "
        "place of /list-endpoints), which this version of fanfold does not support: use a gateway "
        "with the earlier routes, or name one deployment's URL in endpoints.urls"
    )


_KINDS: Final[tuple[tuple[str, DiscoverFunction], ...]] = (
    ("list-endpoints", discover_first),
    ("catalog/v1/clusters", refuse_successor),
)
"""Kinds of gateways by a route that only they have."""


def _list_offers(
    document: Any, urls: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...] | None]]:
    """Yield each path with its models, or None if it offers none of the URLs."""
    clusters = document.get("clusters") if isinstance(document, dict) else None
    for cluster, about in _items(clusters):
        for framework, offered in _items(about.get("frameworks")):
            path = f"{cluster}/{framework}"
            if not _PATH.fullmatch(path):
                continue
            listed = offered.get("endpoints")
            fits = not isinstance(listed, list) or not listed or any(u in listed for u in urls)
            models = offered.get("models")
            named = models if isinstance(models, list) else []
            yield path, tuple(m for m in named if isinstance(m, str)) if fits else None


def _items(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the members of an object that are objects."""
    if isinstance(value, dict):
        yield from ((k, v) for k, v in value.items() if isinstance(v, dict))


def _index_details(document: Any, framework: str) -> dict[str, dict[str, Any]]:
    """Return the entries of a cluster's list of models for one framework, by model."""
    entries = document if isinstance(document, list) else []
    return {
        entry["id"]: entry
        for entry in entries
        if isinstance(entry, dict)
        and isinstance(entry.get("id"), str)
        and entry.get("framework", framework) == framework
    }


def _read_context(about: Mapping[str, Any] | None) -> int | None:
    capabilities = (about or {}).get("capabilities")
    return _read_limit(
        capabilities if isinstance(capabilities, dict) else None, "context_window_tokens"
    )


def _read_limit(about: Mapping[str, Any] | None, name: str) -> int | None:
    number = (about or {}).get(name)
    return number if isinstance(number, int) and number > 0 else None


_RUNNING: Final = {
    "running": DeploymentState.RUNNING,
    "starting": DeploymentState.STARTING,
}


def find_state(jobs: Any, framework: str, model: str) -> DeploymentState | None:
    """Return the state of a model in a cluster's list of jobs, or None without such a list.

    A model that is in no list does not run, nor does one whose workers are disconnected.
    """
    if not isinstance(jobs, dict):
        return None
    for job in _find_jobs(jobs.get("running"), framework, model):
        status = job.get("Model Status", "running")
        if isinstance(status, str) and status in _RUNNING:
            return _RUNNING[status]
    if any(_find_jobs(jobs.get("queued"), framework, model)):
        return DeploymentState.QUEUED
    return DeploymentState.COLD


def _find_jobs(jobs: Any, framework: str, model: str) -> Iterator[dict[str, Any]]:
    for job in jobs if isinstance(jobs, list) else ():
        if isinstance(job, dict) and job.get("Framework", framework) == framework:
            names = str(job.get("Models", "")).split(",")
            if simplify_model(model) in map(simplify_model, names):
                yield job
