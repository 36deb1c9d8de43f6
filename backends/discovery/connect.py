"""From settings to endpoints that answer, and to an open fleet."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from ...configs.endpoints import EndpointsConfig
from ...configs.models import LimitsConfig, RunConfig
from ..core.errors import ConfigurationError, NoEndpointError, RunStoppedError
from ..fleet.cache import RequestCache
from ..fleet.endpoint import EndpointSpec
from ..fleet.fleet import Fleet, FleetClient
from ..fleet.policy import (
    AffinityPolicy,
    FleetPolicy,
    HedgePolicy,
    LoadPolicy,
    ModelParams,
    RateLimitPolicy,
)
from ..simulated.process import launch, make_simulation_spec
from ..storage.response_cache import ResponseCache
from .auto import choose_endpoints
from .probe import probe_models, select_model
from .resolve import (
    PROBE_TIMEOUT_S,
    EndpointSet,
    count_possible_servers,
    get_endpoints_key,
    list_endpoint_specs,
    make_gateway_set,
    open_registry,
)
from .sources import AdmitEndpoints, EndpointSource, FileSource, follow_source

if TYPE_CHECKING:
    from ..fleet.langchain import ChatFleet, LangChainClient


def make_fleet_policy(config: RunConfig, endpoint_set: EndpointSet | None = None) -> FleetPolicy:
    """Return how one process drives the fleet.

    Quotas hold for the run; where several workers share it, each gets its part.

    Args:
        config: The settings.
        endpoint_set: Where the endpoints come from; a gateway has a quota of its own.
    """
    limits = config.limits
    policy = FleetPolicy.from_limits(
        streams=limits.streams,
        attempts=limits.attempts,
        request_timeout_s=limits.request_timeout_s,
        fleet_wait_s=limits.fleet_wait_s,
    )
    return replace(
        policy,
        retry=replace(policy.retry, budget=limits.retry_budget),
        rate_limit=_make_rate_limit(config, endpoint_set),
        hedge=HedgePolicy() if limits.hedge else None,
        affinity=AffinityPolicy(prefix=limits.affinity) if limits.affinity else None,
        load=LoadPolicy(source=limits.load) if limits.load else None,
        whole_answers=endpoint_set is not None and endpoint_set.gateway is not None,
        body_bytes=limits.body_bytes,
    )


def _make_rate_limit(config: RunConfig, place: EndpointSet | None) -> RateLimitPolicy:
    limits, share = config.limits, config.backend.concurrent_shards
    gateway = place.requests_per_s if place is not None else None
    rates = [rate for rate in (limits.requests_per_s, gateway) if rate is not None]
    return RateLimitPolicy(
        requests_per_s=min(rates) / share if rates else None,
        tokens_per_min=limits.tokens_per_min / share if limits.tokens_per_min else None,
        # A gateway counts each second by itself: what was saved up would be refused.
        burst=1.0 if gateway is not None else None,
    )


def apply_limits(limits: LimitsConfig, spec: EndpointSpec) -> EndpointSpec:
    """Return an endpoint with the limits that hold for each, unless it has its own."""
    return replace(
        spec,
        max_in_flight=spec.max_in_flight or limits.endpoint_streams,
        requests_per_s=spec.requests_per_s or limits.endpoint_requests_per_s,
        tokens_per_min=spec.tokens_per_min or limits.endpoint_tokens_per_min,
    )


_LOOK_S: Final = 2.0
_SHARE: Final = 10.0

logger = logging.getLogger(__name__)


def check_cache(config: RunConfig) -> None:
    """Check, without writing, that answers can be kept where the settings say.

    Raises:
        ConfigurationError: They cannot. Nothing is said of a folder that only workers reach.
    """
    remote = config.backend.is_remote and not config.backend.workers_share_folder
    if config.cache in ("off", "run") or remote:
        return
    path = Path(config.cache)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ConfigurationError(f"cache: {there} is no folder; name another, or say cache: off")
    if not os.access(there, os.W_OK | os.X_OK):
        msg = f"cache: {there} cannot be written to; name another folder, or say cache: off"
        raise ConfigurationError(msg)


@asynccontextmanager
async def open_cache(
    config: RunConfig, simulated: bool, own_folder: Path | None
) -> AsyncIterator[RequestCache | None]:
    """Open the answers that the settings name; None when each request is to be sent.

    Args:
        config: The settings.
        simulated: Whether the fleet is.
        own_folder: The run's own folder for them; None where it cannot be reached: a worker then
            keeps them as long as it lives.

    Raises:
        ConfigurationError: The folder cannot be used.
    """
    if config.cache == "off":
        yield None
        return
    async with AsyncExitStack() as stack:
        shared = config.cache != "run"
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
        if contested:
            await stack.enter_async_context(_follow_cache(store))
        reuse = RequestCache(
            store,
            simulated=simulated,
            sampled=config.cache_sampled,
            patience_s=config.limits.request_timeout_s,
        )
        stack.push_async_callback(reuse.aclose)
        yield reuse


@asynccontextmanager
async def _follow_cache(store: ResponseCache) -> AsyncIterator[None]:
    """Read on what other processes keep while the block runs."""
    following = asyncio.create_task(_poll_cache(store), name="follow kept answers")
    try:
        yield
    finally:
        following.cancel()
        await asyncio.wait({following})


async def _poll_cache(store: ResponseCache) -> None:
    """Read what other processes keep, again and again; less often where that takes long."""
    took, warned = 0.0, False
    while True:
        await asyncio.sleep(max(_LOOK_S, _SHARE * took))
        began = time.monotonic()
        try:
            await asyncio.to_thread(store.refresh)
        except OSError as error:  # a cleared folder, or a file system that is away for a while
            if not warned:
                logger.warning("cache: others' answers cannot be read at the moment: %s", error)
            warned = True
        took = time.monotonic() - began


_SAY_S: Final = 60.0


class _HasReady(Protocol):
    """Endpoints that were asked."""

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
    """Ask again and again until as many endpoints are ready as the settings want.

    Args:
        ask: Asks all endpoints that are there.
        endpoints: How many are wanted, and how long that is waited for.
        report: Tells the user what is waited for: when it changes, and once a minute.
        most: Tells how many can still be ready in the end, or None where nobody knows; may block.

    Raises:
        RunStoppedError: They have not come in time, or cannot come any more.
        ConfigurationError: They serve another model, or waiting does not help for another reason.
    """
    begun, told, said = time.monotonic(), "", float("-inf")
    while True:
        found: T | None = None
        try:
            found = await ask()
            state = f"{found.ready} of {endpoints.least} ready"
        except NoEndpointError as error:
            state = f"0 of {endpoints.least} ready ({error.message})"
        if found is not None and found.ready >= endpoints.least:
            return found
        can = await asyncio.to_thread(most)
        if can is not None and can < endpoints.least:
            msg = (
                f"endpoints: {state}, and no more than {can} can be, for servers were given up "
                f"({endpoints.file}/logs/*.failed); nothing was asked, and the same command goes "
                "on when they are there"
            )
            raise RunStoppedError(msg)
        waited = time.monotonic() - begun
        if waited >= endpoints.wait_s:
            msg = (
                f"endpoints: {state} after {waited:.0f} s (endpoints.least, endpoints.wait_s); "
                "nothing was asked, and the same command goes on when they are there"
            )
            raise RunStoppedError(msg)
        if state != told or waited - said >= _SAY_S:
            report(f"endpoints: {state}; waiting, {endpoints.wait_s - waited:.0f} s more at most")
            told, said = state, waited
        await asyncio.sleep(min(endpoints.refresh_s, endpoints.wait_s - waited))


_WARNED: Final = 5

choice_logger = logging.getLogger(f"{__name__}.choice")
"""Tells what ``auto`` chose, and what is waited for; the command line always shows it."""


def make_model_params(config: RunConfig, name: str) -> ModelParams:
    """Return the constant part of every request."""
    return ModelParams(
        name=name,
        temperature=config.model.temperature,
        max_tokens=config.model.max_tokens,
        seed=config.model.seed,
        extra_body=config.model.extra_body,
        schema=config.task.answer_schema,
    )


@asynccontextmanager
async def open_endpoint_set(
    config: RunConfig, written: Mapping[str, Any]
) -> AsyncIterator[EndpointSet]:
    """Return where the settings say that the model is served; start it, if it is simulated.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.

    Raises:
        ConfigurationError: The list of endpoints cannot be had, or ``auto`` finds none.
    """
    endpoints = config.endpoints
    if endpoints.simulated is not None:
        async with launch(make_simulation_spec(config)) as fleet:
            yield EndpointSet(tuple(map(EndpointSpec, fleet.urls)))
    elif endpoints.auto:
        yield await choose_endpoints(config, os.environ, Path.cwd())
    elif endpoints.aegis_registry is not None:
        source: EndpointSource = open_registry(endpoints)
        yield EndpointSet(tuple(await source.list_endpoints()), source)
    elif endpoints.first is not None:
        yield make_gateway_set(endpoints.first, endpoints.proxy)
    else:
        specs = await asyncio.to_thread(list_endpoint_specs, endpoints, written)
        key, file = get_endpoints_key(endpoints), endpoints.file
        yield EndpointSet(tuple(specs), None if file is None else FileSource(Path(file), key))


@dataclass(frozen=True, slots=True)
class ReadyEndpoints:
    """Endpoints that are up, and what they serve.

    Attributes:
        specs: The endpoints.
        model: The model's name.
        simulated: Whether they are simulated.
        absent: A line for each endpoint that did not answer, or is left out.
        endpoint_set: Where they come from, when that may change or is special.
        ready: How many answer, as far as they were asked.
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
    """Start the simulated fleet, or ask the configured endpoints what they serve.

    Where the settings say so, it is waited for endpoints that are not there yet.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.
        model: The model's name when it was settled before; else the configured one.

    Raises:
        ConfigurationError: No endpoint answers, or none serves the model.
        RunStoppedError: Those that are waited for have not come.
    """
    if config.endpoints.simulated is not None:
        async with open_endpoint_set(config, written) as place:
            yield ReadyEndpoints(place.specs, make_simulation_spec(config).model, simulated=True)
        return

    async def ask() -> ReadyEndpoints:
        async with open_endpoint_set(config, written) as place:
            return await find_ready_endpoints(
                place, model or config.model.name, config.endpoints.models
            )

    if config.endpoints.waits_for_endpoints:
        most = partial(count_possible_servers, config, os.environ)
        yield await wait_for_endpoints(ask, config.endpoints, choice_logger.info, most)
    else:
        yield await ask()


async def find_ready_endpoints(
    place: EndpointSet, model: str | None, names: Mapping[str, str]
) -> ReadyEndpoints:
    """Ask endpoints what they serve, and check that it fits.

    Args:
        place: The endpoints.
        model: The model's name, or None for the one that they serve.
        names: Served id to model's name, where they differ.

    Raises:
        ConfigurationError: No endpoint answers, none serves the model, the model is not
            settled, or simulated endpoints stand beside real ones.
    """
    matched = select_model(await place.probe(), model or place.model, names)
    return ReadyEndpoints(
        matched.specs, matched.model, matched.simulated, matched.absent, place, matched.ready
    )


@asynccontextmanager
async def open_fleet(
    config: RunConfig, ready: ReadyEndpoints, cache: RequestCache | None = None
) -> AsyncIterator[Fleet]:
    """Open the fleet over endpoints that are up; warn of those that are not.

    Its members follow their list while the block runs, where that may change.

    Args:
        config: The settings.
        ready: The endpoints.
        cache: Answers that equal requests share, or None.
    """
    place = ready.endpoint_set
    if place is not None and place.reason is not None:
        choice_logger.info("endpoints: %s", place.reason)
    for line in ready.absent[:_WARNED]:
        logger.warning("endpoint %s", line)
    if len(ready.absent) > _WARNED:
        logger.warning("… and %d more endpoints", len(ready.absent) - _WARNED)
    policy = make_fleet_policy(config, place)
    specs = [apply_limits(config.limits, spec) for spec in ready.specs]
    async with Fleet(specs, policy, simulated=ready.simulated, cache=cache) as fleet:
        if place is None or place.source is None:
            yield fleet
            return
        admit, every_s = _admission(config, ready), config.endpoints.refresh_s
        async with follow_source(fleet, place.source, place.specs, admit, every_s):
            yield fleet


def _admission(config: RunConfig, serving: ReadyEndpoints) -> AdmitEndpoints:
    """Return what says which endpoints that join a run fit it."""

    async def admit(specs: list[EndpointSpec]) -> list[EndpointSpec]:
        found = await probe_models(specs, PROBE_TIMEOUT_S)
        if not any(one.reachable for one in found):
            return [apply_limits(config.limits, spec) for spec in specs]
        try:
            matched = select_model(found, serving.model, config.endpoints.models)
        except ConfigurationError as error:
            logger.warning("%d endpoints are left out: %s", len(specs), error.message)
            return []
        for line in matched.absent:
            logger.warning("endpoint %s", line)
        if matched.simulated is not serving.simulated:
            logger.warning(
                "%d endpoints are left out: simulated and real ones never mix", len(specs)
            )
            return []
        return [apply_limits(config.limits, spec) for spec in matched.specs]

    return admit


def make_chat_fleet(fleet: Fleet, params: ModelParams) -> ChatFleet:
    """Return the fleet as a LangChain chat model.

    Behind a gateway answers come whole, also where a stream is asked for.
    """
    # LangChain takes half a second to import, and workers seldom need it
    from ..fleet.langchain import ChatFleet  # noqa: PLC0415

    chat = ChatFleet.of(fleet, params)
    chat.disable_streaming = fleet.policy.whole_answers
    return chat


def make_chat_client(
    fleet: Fleet, params: ModelParams, traced: bool
) -> FleetClient | LangChainClient:
    """Return the fleet's door for item graphs: LangChain's when calls are to be traced."""
    if traced:
        from ..fleet.langchain import LangChainClient  # noqa: PLC0415 - as above

        return LangChainClient(make_chat_fleet(fleet, params))
    return FleetClient(fleet, params)
