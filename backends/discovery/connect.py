"""From settings to concrete parts: the one place that knows both."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...configs.models import RunConfig
from ..core.errors import ConfigurationError
from ..fleet.address import EndpointSpec
from ..fleet.cache import Reuse
from ..fleet.door import FleetModel
from ..fleet.fleet import Fleet
from ..fleet.params import ModelParams
from ..simulated.process import launch, simulation
from .auto import choose
from .limits import fleet_policy, limited
from .matching import match
from .membership import Admit, FileSource, Source, kept_up
from .node import most_servers
from .probe import discover
from .resolve import PROBE_TIMEOUT_S, Place, endpoint_specs, endpoints_key, first_place, registry
from .waiting import enough

if TYPE_CHECKING:
    from ..fleet.langchain import ChatFleet
    from ..fleet.upper import LangChainModel

_WARNED: Final = 5

logger = logging.getLogger(__name__)
choice_logger = logging.getLogger(f"{__name__}.choice")
"""Tells what ``auto`` chose, and what is waited for; the command line always shows it."""


def model_params(config: RunConfig, name: str) -> ModelParams:
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
async def located(config: RunConfig, written: Mapping[str, Any]) -> AsyncIterator[Place]:
    """Return where the settings say that the model is served; start it, if it is simulated.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.

    Raises:
        ConfigurationError: The list of endpoints cannot be had, or ``auto`` finds none.
    """
    endpoints = config.endpoints
    if endpoints.simulated is not None:
        async with launch(simulation(config)) as fleet:
            yield Place(tuple(map(EndpointSpec, fleet.urls)))
    elif endpoints.auto:
        yield await choose(config, os.environ, Path.cwd())
    elif endpoints.aegis_registry is not None:
        source: Source = registry(endpoints)
        yield Place(tuple(await source.look()), source)
    elif endpoints.first is not None:
        yield first_place(endpoints.first, endpoints.proxy)
    else:
        specs = await asyncio.to_thread(endpoint_specs, endpoints, written)
        key, file = endpoints_key(endpoints), endpoints.file
        yield Place(tuple(specs), None if file is None else FileSource(Path(file), key))


@dataclass(frozen=True, slots=True)
class Serving:
    """Endpoints that are up, and what they serve.

    Attributes:
        specs: The endpoints.
        model: The model's name.
        simulated: Whether they are simulated.
        absent: A line for each endpoint that did not answer, or is left out.
        place: Where they come from, when that may change or is special.
        ready: How many answer, as far as they were asked.
    """

    specs: tuple[EndpointSpec, ...]
    model: str
    simulated: bool
    absent: tuple[str, ...] = ()
    place: Place | None = None
    ready: int = 0


@asynccontextmanager
async def serving(
    config: RunConfig, written: Mapping[str, Any], model: str | None = None
) -> AsyncIterator[Serving]:
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
        async with located(config, written) as place:
            yield Serving(place.specs, simulation(config).model, simulated=True)
        return

    async def ask() -> Serving:
        async with located(config, written) as place:
            return await survey(place, model or config.model.name, config.endpoints.models)

    if config.endpoints.awaited:
        most = partial(most_servers, config, os.environ)
        yield await enough(ask, config.endpoints, choice_logger.info, most)
    else:
        yield await ask()


async def survey(place: Place, model: str | None, names: Mapping[str, str]) -> Serving:
    """Ask endpoints what they serve, and check that it fits.

    Args:
        place: The endpoints.
        model: The model's name, or None for the one that they serve.
        names: Served id to model's name, where they differ.

    Raises:
        ConfigurationError: No endpoint answers, none serves the model, the model is not
            settled, or simulated endpoints stand beside real ones.
    """
    matched = match(await place.ask(), model or place.model, names)
    return Serving(
        matched.specs, matched.model, matched.simulated, matched.absent, place, matched.ready
    )


@asynccontextmanager
async def open_fleet(
    config: RunConfig, serving: Serving, reuse: Reuse | None = None
) -> AsyncIterator[Fleet]:
    """Open the fleet over endpoints that are up; warn of those that are not.

    Its members follow their list while the block runs, where that may change.

    Args:
        config: The settings.
        serving: The endpoints.
        reuse: Answers that equal requests share, or None.
    """
    place = serving.place
    if place is not None and place.why is not None:
        choice_logger.info("endpoints: %s", place.why)
    for line in serving.absent[:_WARNED]:
        logger.warning("endpoint %s", line)
    if len(serving.absent) > _WARNED:
        logger.warning("… and %d more endpoints", len(serving.absent) - _WARNED)
    policy = fleet_policy(config, place)
    specs = [limited(config.limits, spec) for spec in serving.specs]
    async with Fleet(specs, policy, simulated=serving.simulated, reuse=reuse) as fleet:
        if place is None or place.source is None:
            yield fleet
            return
        admit, every_s = _admission(config, serving), config.endpoints.refresh_s
        async with kept_up(fleet, place.source, place.specs, admit, every_s):
            yield fleet


def _admission(config: RunConfig, serving: Serving) -> Admit:
    """Return what says which endpoints that join a run fit it."""

    async def admit(specs: list[EndpointSpec]) -> list[EndpointSpec]:
        found = await discover(specs, PROBE_TIMEOUT_S)
        if not any(one.reachable for one in found):
            return [limited(config.limits, spec) for spec in specs]
        try:
            matched = match(found, serving.model, config.endpoints.models)
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
        return [limited(config.limits, spec) for spec in matched.specs]

    return admit


def chat_fleet(fleet: Fleet, params: ModelParams) -> ChatFleet:
    """Return the fleet as a LangChain chat model.

    Behind a gateway answers come whole, also where a stream is asked for.
    """
    # LangChain takes half a second to import, and workers seldom need it
    from ..fleet.langchain import ChatFleet  # noqa: PLC0415

    chat = ChatFleet.of(fleet, params)
    chat.disable_streaming = fleet.policy.whole_answers
    return chat


def chat_door(fleet: Fleet, params: ModelParams, traced: bool) -> FleetModel | LangChainModel:
    """Return the fleet's door for item graphs: LangChain's when calls are to be traced."""
    if traced:
        from ..fleet.upper import LangChainModel  # noqa: PLC0415 - as above

        return LangChainModel(chat_fleet(fleet, params))
    return FleetModel(fleet, params)
