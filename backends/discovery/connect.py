"""From settings to endpoints that answer, and to an open fleet."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_result, stop_after_delay

from ...configs.endpoints import EndpointsConfig
from ...configs.loader import LoadedConfig
from ...configs.models import LimitsConfig, RunConfig
from ..core.errors import (
    ConfigurationError,
    MissingExtraError,
    NoEndpointError,
    RunStoppedError,
)
from ..core.types import CHAT_URL, Usage
from ..fleet.endpoint import DeploymentState, EndpointSpec
from ..fleet.failures import LOGPROBS_FIELD
from ..fleet.policy import (
    AffinityPolicy,
    FleetPolicy,
    HedgePolicy,
    LoadPolicy,
    ModelParams,
    RateLimitPolicy,
    SessionPolicy,
    make_prefix_policies,
)
from ..simulated.process import launch, make_simulation_spec
from .gateway import describe_members
from .probe import probe_models, select_model
from .resolve import (
    PROBE_TIMEOUT_S,
    EndpointSet,
    check_endpoint_set,
    count_possible_servers,
    fit_requests,
    get_endpoints_key,
    has_own_servers,
    list_endpoint_specs,
    make_gateway_set,
    open_registry,
)
from .sources import AdmitEndpoints, EndpointSource, FileSource, follow_source, locate_file

if TYPE_CHECKING:
    from ..fleet.cache import RequestCache
    from ..fleet.fleet import Fleet, FleetClient
    from ..fleet.langchain import ChatFleet, LangChainClient
    from ..fleet.memory import FleetMemory
    from ..storage.response_cache import ResponseCache


SESSION_HEADER: Final = "X-ALCF-Session-ID"
"""Header by which the FIRST gateway assigns a user's requests to replicas."""


def make_session_policy(run: str, count: int) -> SessionPolicy:
    """Return the sessions of a run: a name that tells nothing, the same in all its processes."""
    names = (run, *(f"{run} {n}" for n in range(1, count)))
    digests = (hashlib.sha256(name.encode()).hexdigest()[:8] for name in names)
    return SessionPolicy(SESSION_HEADER, tuple(f"ff-{digest}" for digest in digests))


def make_fleet_policy(
    config: RunConfig,
    endpoint_set: EndpointSet | None = None,
    run: str | None = None,
    prefix: int | None = None,
) -> FleetPolicy:
    """Return how one process uses the fleet.

    Quotas hold for the whole run; if several workers share it, each gets its part.

    Args:
        config: The settings.
        endpoint_set: Where the endpoints come from; a gateway has a quota of its own.
        run: The run's id, from which the sessions at a gateway follow; None: one for this fleet.
        prefix: Characters that are equal at the beginning of a group of prompts, or None. Settings
            of affinity and load take precedence; at a gateway, sessions take its place.
    """
    behind = endpoint_set is not None and endpoint_set.gateway is not None
    first = config.endpoints.first
    sessions = first.sessions if first is not None else 1
    limits = config.limits
    policy = FleetPolicy.from_limits(
        streams=limits.streams,
        attempts=limits.attempts,
        request_timeout_s=limits.request_timeout_s,
        fleet_wait_s=limits.fleet_wait_s,
    )
    grouped = make_prefix_policies(None if behind else prefix)
    if limits.affinity:
        grouped["affinity"] = AffinityPolicy(prefix=limits.affinity)
    if limits.load:
        grouped["load"] = LoadPolicy(source=limits.load)
    return replace(
        policy,
        retry=replace(policy.retry, budget=limits.retry_budget),
        rate_limit=_make_rate_limit(config, endpoint_set),
        hedge=HedgePolicy() if limits.hedge else None,
        session=make_session_policy(run or secrets.token_hex(8), sessions) if behind else None,
        whole_answers=behind,
        body_bytes=limits.body_bytes,
        own_fields=config.input.is_batch,
        file_hosts=frozenset(config.batch.allowed_media_domains),
        optional_fields=frozenset(_ask_certainty(config)),
        **grouped,
    )


def _make_rate_limit(config: RunConfig, endpoint_set: EndpointSet | None) -> RateLimitPolicy:
    limits, backend = config.limits, config.backend
    gateway = endpoint_set.requests_per_s if endpoint_set is not None else None
    rates = [rate for rate in (limits.requests_per_s, gateway) if rate is not None]
    return RateLimitPolicy(
        requests_per_s=min(rates) if rates else None,
        tokens_per_min=limits.tokens_per_min,
        share=1.0 / backend.concurrent_shards,
        shares_endpoints=not backend.node_endpoints,
    )


def apply_limits(limits: LimitsConfig, spec: EndpointSpec) -> EndpointSpec:
    """Return an endpoint with the configured per-endpoint limits, unless it has its own."""
    return replace(
        spec,
        max_in_flight=spec.max_in_flight or limits.endpoint_streams,
        requests_per_s=spec.requests_per_s or limits.endpoint_requests_per_s,
        tokens_per_min=spec.tokens_per_min or limits.endpoint_tokens_per_min,
    )


def find_rate_limits(
    policy: RateLimitPolicy, limits: LimitsConfig, specs: Iterable[EndpointSpec]
) -> tuple[float | None, float | None]:
    """Return the requests per second and the tokens per minute that all limits together allow.

    Args:
        policy: The limits of the run.
        limits: The settings of limits.
        specs: The endpoints; those behind a gateway that do not run join only if the others fail.
    """
    own = [apply_limits(limits, spec) for spec in specs]
    running = [one for one in own if one.state in (None, DeploymentState.RUNNING)]
    own = running or own[:1]
    requests = [one.requests_per_s for one in own if one.requests_per_s is not None]
    tokens = [one.tokens_per_min * 60 / one.window_s for one in own if one.tokens_per_min]
    rates = [
        policy.requests_per_s,
        sum(requests) if requests and len(requests) == len(own) else None,
    ]
    flows = [policy.tokens_per_min, sum(tokens) if tokens and len(tokens) == len(own) else None]
    return (
        min((rate for rate in rates if rate is not None), default=None),
        min((flow for flow in flows if flow is not None), default=None),
    )


COORDINATOR_SHARE: Final = 0.01
"""Part of a run's rate limits for the requests by which its coordinator starts models."""


def find_token_window(specs: Iterable[EndpointSpec]) -> float:
    """Return the length in seconds of the windows in which the endpoints count tokens."""
    return max((spec.window_s for spec in specs if spec.tokens_per_min), default=60.0)


_POLL_S: Final = 2.0
_POLL_FACTOR: Final = 10.0

logger = logging.getLogger(__name__)


def check_cache(config: RunConfig) -> None:
    """Check, without writing, that the configured cache folder can be used.

    A folder that only workers can access is not checked.

    Raises:
        ConfigurationError: The folder cannot be used.
    """
    remote = config.backend.is_remote and not config.backend.workers_share_folder
    if config.cache in ("off", "run") or remote:
        return
    path = Path(config.cache)
    existing = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not existing.is_dir():
        msg = f"cache: {existing} is not a folder; set another path, or cache: off"
        raise ConfigurationError(msg)
    if not os.access(existing, os.W_OK | os.X_OK):
        msg = f"cache: {existing} is not writable; set another folder, or cache: off"
        raise ConfigurationError(msg)


def check_endpoints(loaded: LoadedConfig) -> None:
    """Check the settings of the endpoints without sending a request.

    Raises:
        ConfigurationError: No endpoint, a malformed URL, an unreadable file, or an unknown
            simulated fleet.
    """
    try:
        if loaded.config.endpoints.simulated is None:
            check_endpoint_set(loaded.config.endpoints, loaded.plain["endpoints"])
        else:
            make_simulation_spec(loaded.config)
    except MissingExtraError:
        raise
    except NoEndpointError as error:
        if not (loaded.config.backend.node_endpoints and has_own_servers(loaded.config)):
            raise ConfigurationError(f"{loaded.source}: {error.message}") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{loaded.source}: {error.message}") from None


@asynccontextmanager
async def open_cache(
    config: RunConfig, simulated: bool, own_folder: Path | None
) -> AsyncIterator[RequestCache | None]:
    """Open the configured response cache; yield None if every request must be sent.

    Without one, a run over parts of documents stores the answers about their pieces, so that they
    are paid once.

    Args:
        config: The settings.
        simulated: Whether the fleet is simulated.
        own_folder: The run's own cache folder; None if it cannot be accessed: a worker then caches
            in a temporary folder until it exits.

    Raises:
        ConfigurationError: The folder cannot be used.
    """
    is_off = config.cache == "off"
    if is_off and (config.input.split is None or own_folder is None):
        yield None
        return
    # `check` and `endpoints`, which should start fast, open no fleet
    from ..fleet.cache import RequestCache  # noqa: PLC0415
    from ..storage.response_cache import ResponseCache  # noqa: PLC0415

    async with AsyncExitStack() as stack:
        shared = not is_off and config.cache != "run"
        contested = shared or (own_folder is not None and config.backend.is_remote)
        folder = Path(config.cache) if shared else own_folder
        if folder is None:
            made = await asyncio.to_thread(tempfile.TemporaryDirectory, prefix="fanfold-")
            stack.push_async_callback(asyncio.to_thread, made.cleanup)
            folder = Path(made.name)
        writer = f"{socket.gethostname()}-{os.getpid()}"
        store = ResponseCache(folder, simulated=simulated, writer=writer, contested=contested)
        stack.push_async_callback(asyncio.to_thread, store.close)
        await asyncio.to_thread(store.open)
        if contested and not is_off:  # a claim shows what a lost worker has stored for an item
            await stack.enter_async_context(_follow_cache(store))
        reuse = RequestCache(
            store,
            simulated=simulated,
            sampled=config.cache_sampled or is_off,
            marked=is_off,
            patience_s=config.limits.request_timeout_s,
        )
        stack.push_async_callback(reuse.aclose)
        yield reuse


@asynccontextmanager
async def _follow_cache(store: ResponseCache) -> AsyncIterator[None]:
    """Load responses that other processes cache, while the block runs."""
    following = asyncio.create_task(_poll_cache(store), name="follow the response cache")
    try:
        yield
    finally:
        following.cancel()
        await asyncio.wait({following})


async def _poll_cache(store: ResponseCache) -> None:
    """Load responses that other processes cache, periodically; less often if that takes long."""
    took, warned = 0.0, False
    while True:
        await asyncio.sleep(max(_POLL_S, _POLL_FACTOR * took))
        began = time.monotonic()
        try:
            await asyncio.to_thread(store.refresh)
        except OSError as error:  # a cleared folder, or a file system that is briefly unavailable
            if not warned:
                logger.warning(
                    "cache: cannot read responses that other processes cached (will retry): %s",
                    error,
                )
            warned = True
        took = time.monotonic() - began


_REPORT_S: Final = 60.0


class _HasReady(Protocol):
    """Endpoints that were probed."""

    @property
    def ready(self) -> int:
        """Return how many answer and serve the model."""
        ...


T = TypeVar("T", bound=_HasReady)


def _unknown() -> None:
    return None


async def wait_for_endpoints(
    ask: Callable[[], Awaitable[T]],
    endpoints: EndpointsConfig,
    report: Callable[[str], None],
    most: Callable[[], int | None] = _unknown,
) -> T:
    """Probe repeatedly until as many endpoints are ready as the settings require.

    Args:
        ask: Probes all known endpoints.
        endpoints: How many are required, and how long to wait for them.
        report: Reports the state to the user: when it changes, and once a minute.
        most: Returns how many can become ready at most, or None if that is unknown; may block.

    Raises:
        RunStoppedError: They are not ready in time, or cannot become ready any more.
        ConfigurationError: They serve another model, or waiting does not help for another reason.
    """
    state, reported, reported_at = "", "", 0.0

    async def probe() -> T | None:
        nonlocal state
        found: T | None = None
        try:
            found = await ask()
            state = f"{found.ready} of {endpoints.least} ready"
        except NoEndpointError as error:
            state = f"0 of {endpoints.least} ready ({error.message})"
        if found is not None and found.ready >= endpoints.least:
            return found
        possible = await asyncio.to_thread(most)
        if possible is not None and possible < endpoints.least:
            msg = (
                f"endpoints: {state}, and at most {possible} can become ready, because servers "
                f"failed ({endpoints.file}/logs/*.failed); no request was sent; fix the servers "
                "and run the same command again"
            )
            raise RunStoppedError(msg)
        return None

    def get_seconds_left(call: RetryCallState) -> float:
        return endpoints.wait_s - (call.seconds_since_start or 0.0)

    def report_state(call: RetryCallState) -> None:
        nonlocal reported, reported_at
        left = get_seconds_left(call)
        if state != reported or reported_at - left >= _REPORT_S:
            report(f"endpoints: {state}; waiting up to {left:.0f} s more")
            reported, reported_at = state, left

    def give_up(call: RetryCallState) -> NoReturn:
        msg = (
            f"endpoints: {state} after {call.seconds_since_start:.0f} s (endpoints.least, "
            "endpoints.wait_s); no request was sent; run the same command again when they are ready"
        )
        raise RunStoppedError(msg)

    retrying = AsyncRetrying(
        sleep=asyncio.sleep,
        retry=retry_if_result(lambda found: found is None),
        stop=stop_after_delay(endpoints.wait_s),
        wait=lambda call: min(endpoints.refresh_s, get_seconds_left(call)),
        before_sleep=report_state,
        retry_error_callback=give_up,
    )
    ready: T = await retrying(probe)
    return ready


_WARNED: Final = 5

choice_logger = logging.getLogger(f"{__name__}.choice")
"""Logs what ``auto`` chose and what fanfold waits for; the command line always shows it."""


def _ask_certainty(config: RunConfig) -> dict[str, bool]:
    """Return the field of a request that asks for the log probabilities of the tokens."""
    return {LOGPROBS_FIELD: True} if config.task.certainty is not None else {}


def make_model_params(config: RunConfig, name: str) -> ModelParams:
    """Return the constant part of every request."""
    return ModelParams(
        name=name,
        temperature=config.model.temperature,
        max_tokens=config.model.max_tokens,
        max_tokens_field=(
            "max_tokens"
            if config.model.max_tokens_field == "max_tokens"
            else "max_completion_tokens"
        ),
        seed=config.model.seed,
        extra_body={**config.model.extra_body, **_ask_certainty(config)},
        schema=config.task.answer_schema,
    )


@asynccontextmanager
async def open_endpoint_set(
    config: RunConfig, written: Mapping[str, Any]
) -> AsyncIterator[EndpointSet]:
    """Yield the configured endpoints; start the fleet if it is simulated.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.

    Raises:
        ConfigurationError: The list of endpoints cannot be read, or ``auto`` finds none.
    """
    endpoints = config.endpoints
    if endpoints.simulated is not None:
        async with launch(make_simulation_spec(config)) as fleet:
            yield EndpointSet(tuple(map(EndpointSpec, fleet.urls)))
    elif endpoints.auto:
        from .auto import choose_endpoints  # noqa: PLC0415 - for `auto` only

        yield await choose_endpoints(config, os.environ, Path.cwd())
    elif endpoints.aegis_registry is not None:
        source: EndpointSource = open_registry(endpoints)
        yield EndpointSet(tuple(await source.list_endpoints()), source)
    elif endpoints.first is not None:
        yield fit_requests(make_gateway_set(endpoints.first, endpoints.proxy), config)
    else:
        specs = await asyncio.to_thread(list_endpoint_specs, endpoints, written)
        if endpoints.file is None:
            yield EndpointSet(tuple(specs))
            return
        file = FileSource(Path(endpoints.file), get_endpoints_key(endpoints))
        if specs:
            yield EndpointSet(tuple(specs), file)
            return
        listed = await file.list_endpoints()
        by = "" if file.registry is None else f" {file.registry.url}"
        path = await asyncio.to_thread(locate_file, Path(endpoints.file))
        yield EndpointSet(
            tuple(listed),
            file,
            reason=f"{path} is not written yet; listed by Aegis' registry{by}",
        )


@dataclass(frozen=True, slots=True)
class ReadyEndpoints:
    """Endpoints that are up, and the model that they serve.

    Attributes:
        specs: The endpoints.
        model: The model's name.
        simulated: Whether they are simulated.
        absent: A line for each endpoint that did not answer, or is excluded.
        endpoint_set: Where they come from, if that may change or is special.
        ready: How many answer, among those that were probed.
    """

    specs: tuple[EndpointSpec, ...]
    model: str
    simulated: bool
    absent: tuple[str, ...] = ()
    endpoint_set: EndpointSet | None = None
    ready: int = 0


@asynccontextmanager
async def open_ready_endpoints(
    config: RunConfig, written: Mapping[str, Any], model: str | None = None
) -> AsyncIterator[ReadyEndpoints]:
    """Start the simulated fleet, or probe the configured endpoints.

    Waits for endpoints that are not up yet if the settings ask for it.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.
        model: The model's name if it is already settled; else the configured one.

    Raises:
        ConfigurationError: No endpoint answers, or none serves the model.
        RunStoppedError: The required endpoints are not ready in time.
    """
    if config.endpoints.simulated is not None:
        async with open_endpoint_set(config, written) as found:
            yield ReadyEndpoints(found.specs, make_simulation_spec(config).model, simulated=True)
        return

    async def ask() -> ReadyEndpoints:
        async with open_endpoint_set(config, written) as found:
            return await find_ready_endpoints(
                found, model or config.model.name, config.endpoints.models
            )

    if config.endpoints.waits_for_endpoints:
        most = partial(count_possible_servers, config, os.environ)
        yield await wait_for_endpoints(ask, config.endpoints, choice_logger.info, most)
    else:
        yield await ask()


async def find_ready_endpoints(
    endpoint_set: EndpointSet, model: str | None, names: Mapping[str, str]
) -> ReadyEndpoints:
    """Probe endpoints, and check that they fit the run.

    Args:
        endpoint_set: The endpoints.
        model: The model's name, or None for the one that they serve.
        names: Served id to model's name, where they differ.

    Raises:
        ConfigurationError: No endpoint answers, none serves the model, the model is not settled, or
            simulated and real endpoints are mixed.
    """
    name = model or endpoint_set.model
    check_tags(endpoint_set, name, names)
    found = await endpoint_set.probe()
    matched = select_model(found, name, names)
    specs = matched.specs
    if endpoint_set.gateway is not None:
        specs = endpoint_set.gateway.make_members(found, specs, matched.model)
        chosen = describe_members(specs)
        reason = f"{endpoint_set.reason}: {chosen}" if endpoint_set.reason else chosen
        endpoint_set = replace(endpoint_set, reason=reason)
    return ReadyEndpoints(
        specs,
        matched.model,
        matched.simulated,
        matched.absent,
        endpoint_set,
        matched.ready,
    )


def check_tags(endpoint_set: EndpointSet, name: str | None, names: Mapping[str, str]) -> None:
    """Check that a list that may grow has an endpoint for the model.

    Args:
        endpoint_set: The endpoints.
        name: The model's name, or None if it is not settled.
        names: Served id to model's name, where they differ.

    Raises:
        NoEndpointError: All are listed with another model.
    """
    if endpoint_set.source is None or name is None:
        return
    tags = {spec.model for spec in endpoint_set.specs}
    if all(tag is not None and name not in {tag, names.get(tag)} for tag in tags):
        listed = ", ".join(sorted(tag for tag in tags if tag is not None))
        raise NoEndpointError(
            f"no endpoint serves model.name {name!r}; listed so far: {listed} (endpoints.wait_s "
            "waits for one)"
        )


@asynccontextmanager
async def open_deployments(
    config: RunConfig,
    ready: ReadyEndpoints,
    run: str,
    count_probe: Callable[[Usage], None] | None = None,
    url: str = CHAT_URL,
) -> AsyncIterator[tuple[ReadyEndpoints, Fleet | None]]:
    """Wait until the model runs behind a gateway, start it if needed, and log the choice.

    Workers get their tasks after that, because each of them would start the model itself.

    Args:
        config: The settings.
        ready: The endpoints.
        run: The run's id.
        count_probe: Called with the tokens of the requests that start models, or None.
        url: URL of a request of the run.

    Yields:
        The endpoints with their states now, and a fleet that follows the deployments and gets no
        item; None without a gateway.

    Raises:
        FanfoldError: The model does not start.
    """
    if not any(spec.watch is not None for spec in ready.specs):
        _log_choice(ready)
        yield ready, None
        return
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(
            open_fleet(config, ready, run=run, share=COORDINATOR_SHARE)
        )
        if count_probe is not None:
            stack.enter_context(fleet.count_probes(count_probe))
        await fleet.wait_alive(url)
        started = {one.label for one in fleet.endpoints if one.alive}
        specs = tuple(
            replace(spec, state=DeploymentState.RUNNING) if spec.label in started else spec
            for spec in ready.specs
        )
        yield replace(ready, specs=specs), fleet


def _log_choice(ready: ReadyEndpoints) -> None:
    """Log which endpoints were chosen, if there was a choice."""
    if ready.endpoint_set is not None and ready.endpoint_set.reason is not None:
        choice_logger.info("endpoints: %s", ready.endpoint_set.reason)


def pack_deployments(ready: ReadyEndpoints) -> list[dict[str, Any]] | None:
    """Return the chosen deployments of a gateway for workers; None without one."""
    endpoint_set = ready.endpoint_set
    if endpoint_set is None or endpoint_set.gateway is None:
        return None
    return endpoint_set.gateway.pack_members(ready.specs, ready.model)


def unpack_deployments(
    config: RunConfig, deployments: Sequence[Mapping[str, Any]], model: str
) -> ReadyEndpoints:
    """Return the endpoints of a worker: deployments that its coordinator chose; sends no request.

    Raises:
        ConfigurationError: They are malformed, or the settings have no gateway.
    """
    endpoints = config.endpoints
    if endpoints.first is None:
        raise ConfigurationError("the task names deployments, but the settings have no gateway")
    endpoint_set = make_gateway_set(endpoints.first, endpoints.proxy)
    assert endpoint_set.gateway is not None, "it was made for one"
    specs = endpoint_set.gateway.unpack_members(deployments, model)
    return ReadyEndpoints(specs, model, simulated=False, endpoint_set=endpoint_set)


@asynccontextmanager
async def open_fleet(  # noqa: PLR0913, PLR0917 - each is given by one kind of caller
    config: RunConfig,
    ready: ReadyEndpoints,
    cache: RequestCache | None = None,
    run: str | None = None,
    share: float | None = None,
    prefix: int | None = None,
    memory: FleetMemory | None = None,
) -> AsyncIterator[Fleet]:
    """Open the fleet over endpoints that are up; warn about those that are not.

    If the list of endpoints may change, the fleet follows it while the block runs.

    Args:
        config: The settings.
        ready: The endpoints.
        cache: Cache of responses to equal requests, or None.
        run: The run's id, or None.
        share: Part of the run's rate limits for this process; None: that of a worker.
        prefix: Characters that are equal at the beginning of a group of prompts, or None.
        memory: What earlier fleets of this process have learned, or None.
    """
    from ..fleet.fleet import Fleet  # noqa: PLC0415 - as in `open_cache`

    endpoint_set = ready.endpoint_set
    _log_choice(ready)
    for line in ready.absent[:_WARNED]:
        logger.warning("endpoint %s", line)
    if len(ready.absent) > _WARNED:
        logger.warning("… and %d more endpoints", len(ready.absent) - _WARNED)
    policy = make_fleet_policy(config, endpoint_set, run, prefix)
    if share is not None:
        policy = replace(policy, rate_limit=replace(policy.rate_limit, share=share))
    specs = [apply_limits(config.limits, spec) for spec in ready.specs]
    opening = Fleet(
        specs, policy, simulated=ready.simulated, cache=cache, memory=memory, model=ready.model
    )
    async with opening as fleet:
        if endpoint_set is None or endpoint_set.source is None:
            yield fleet
            return
        admit, every_s = _admission(config, ready), config.endpoints.refresh_s
        async with follow_source(fleet, endpoint_set.source, endpoint_set.specs, admit, every_s):
            yield fleet


def _admission(config: RunConfig, ready: ReadyEndpoints) -> AdmitEndpoints:
    """Return a function that selects the new endpoints that fit the run."""

    async def admit(specs: list[EndpointSpec]) -> list[EndpointSpec]:
        found = await probe_models(specs, PROBE_TIMEOUT_S)
        if not any(one.reachable for one in found):
            return [apply_limits(config.limits, spec) for spec in specs]
        try:
            matched = select_model(found, ready.model, config.endpoints.models)
        except ConfigurationError as error:
            logger.warning("%d new endpoints excluded: %s", len(specs), error.message)
            return []
        for line in matched.absent:
            logger.warning("endpoint %s", line)
        if matched.simulated is not ready.simulated:
            logger.warning(
                "%d new endpoints excluded: simulated and real endpoints must not be mixed",
                len(specs),
            )
            return []
        return [apply_limits(config.limits, spec) for spec in matched.specs]

    return admit


def make_chat_fleet(fleet: Fleet, params: ModelParams) -> ChatFleet:
    """Return the fleet as a LangChain chat model.

    Behind a gateway a stream yields the whole answer at once.
    """
    # LangChain takes half a second to import, and workers rarely need it
    from ..fleet.langchain import ChatFleet  # noqa: PLC0415

    chat = ChatFleet.of(fleet, params)
    chat.disable_streaming = fleet.policy.whole_answers
    return chat


def make_chat_client(
    fleet: Fleet, params: ModelParams, traced: bool
) -> FleetClient | LangChainClient:
    """Return the chat client for item graphs: LangChain's if calls are traced, else the fleet's."""
    if traced:
        from ..fleet.langchain import LangChainClient  # noqa: PLC0415 - as above

        return LangChainClient(make_chat_fleet(fleet, params))
    from ..fleet.fleet import FleetClient  # noqa: PLC0415 - as in `open_cache`

    return FleetClient(fleet, params)
