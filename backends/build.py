"""From settings to concrete parts: the one place that knows both."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import orjson
from pydantic import TypeAdapter, ValidationError

from ..configs.models import EndpointsConfig, RunConfig
from ..configs.plain import MASKED
from .contract.errors import ConfigurationError, MissingExtraError
from .contract.template import Template
from .fleet.address import EndpointSpec, base_url
from .fleet.chat import ChatFleet
from .fleet.door import FleetModel, LangChainModel
from .fleet.fleet import Fleet
from .fleet.params import ModelParams
from .fleet.policy import FleetPolicy
from .fleet.probe import Checked, Found, check_models, discover
from .fleet.simulated.launch import launch
from .fleet.simulated.responders import RESPONDERS
from .fleet.simulated.rules import FaultRule
from .fleet.simulated.spec import SimulationSpec
from .fleet.sources import parse_endpoints_file
from .inputs.spec import InputSpec

PROBE_TIMEOUT_S: Final = 5.0
_WARNED: Final = 5

logger = logging.getLogger(__name__)


def input_spec(config: RunConfig, items: Sequence[Mapping[str, Any]] | None) -> InputSpec:
    """Return where the items come from; pasted ``items`` take the place of what is configured.

    Pasted items are named by the configured id column if any of them has it.
    """
    given = config.input
    if items is None:
        return InputSpec(
            path=Path(given.path) if given.path else None,
            dataset=given.dataset,
            id=given.id,
            limit=given.limit,
            on_duplicate=given.on_duplicate,
            smiles=given.smiles,
        )
    named = any(isinstance(item, Mapping) and given.id in item for item in items)
    return InputSpec(
        items=items,
        id=given.id if named else None,
        limit=given.limit,
        on_duplicate=given.on_duplicate,
        smiles=given.smiles,
    )


def needed_columns(config: RunConfig) -> tuple[str, ...]:
    """Return the columns that the prompt and the reduce stages show, each once."""
    shown = [name for stage in config.reduce for name in getattr(stage, "show", ())]
    return tuple(dict.fromkeys([*Template.parse(config.task.prompt).columns, *shown]))


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


def simulation(config: RunConfig) -> SimulationSpec:
    """Return the simulated fleet that the settings describe.

    Raises:
        ConfigurationError: No simulated fleet is configured, there is no such responder, or a
            fault rule is wrong.
        MissingExtraError: The responder needs RDKit.
    """
    simulated = config.endpoints.simulated
    if simulated is None:
        raise ConfigurationError("endpoints.simulated is not set")
    if simulated.responder not in RESPONDERS:
        msg = (
            f"endpoints.simulated.responder: unknown responder {simulated.responder!r}; "
            f"there are {', '.join(sorted(RESPONDERS))}"
        )
        raise ConfigurationError(msg)
    if simulated.responder == "esol" and find_spec("rdkit") is None:
        raise MissingExtraError("endpoints.simulated.responder: esol", "chem")
    for n, rule in enumerate(simulated.faults):
        _check_fault(f"endpoints.simulated.faults.{n}", rule)
    fields = simulated.model_dump(exclude_none=True)
    if config.model.name is not None:
        fields["model"] = config.model.name
    try:
        return SimulationSpec.from_json(orjson.dumps(fields))
    except ConfigurationError as error:
        raise ConfigurationError(f"endpoints.simulated: {error.message}") from None


def _check_fault(key: str, rule: Mapping[str, Any]) -> None:
    try:
        FaultRule.from_mapping(rule)
        TypeAdapter(FaultRule).validate_python(rule)
    except ConfigurationError as error:
        raise ConfigurationError(f"{key}: {error.message}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigurationError(f"{key}.{first['loc'][0]}: {first['msg'].lower()}") from None
    except TypeError as error:
        raise ConfigurationError(f"{key}: a value is of the wrong type: {error}") from None


def endpoint_specs(endpoints: EndpointsConfig, written: Mapping[str, Any]) -> list[EndpointSpec]:
    """Return the configured endpoints.

    Args:
        endpoints: The settings, variables expanded.
        written: The same as the user wrote them: what may be shown.

    Raises:
        ConfigurationError: None given, a malformed URL, an unreadable file, no key.
    """
    key = endpoints.api_key.get_secret_value()
    if key == MASKED:
        msg = (
            "endpoints.api_key: a run folder does not keep a key that was written out; give it "
            "again, best by a variable: --set 'endpoints.api_key=${VAR}'"
        )
        raise ConfigurationError(msg)
    if endpoints.file is not None:
        return _from_file(Path(endpoints.file), key)
    if not endpoints.urls:
        msg = "endpoints.urls is empty; give base URLs such as http://node17:8000/v1"
        raise ConfigurationError(msg)
    shown = written.get("urls") or endpoints.urls
    specs = []
    for n, (url, text) in enumerate(zip(endpoints.urls, shown, strict=True)):
        where = f"endpoints.urls.{n}"
        _refuse_password(url, where)
        specs.append(EndpointSpec(_checked(url, where), key, text if "${" in text else None))
    return specs


def _refuse_password(url: str, where: str) -> None:
    if "@" in url.partition("//")[2].partition("/")[0]:
        raise ConfigurationError(f"{where}: no user or password in a URL; use api_key: ${{VAR}}")


def _checked(url: str, where: str) -> str:
    try:
        return base_url(url)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error.message}") from None


def _from_file(path: Path, key: str) -> list[EndpointSpec]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigurationError(f"endpoints.file: {path}: cannot be read: {reason}") from None
    specs = parse_endpoints_file(text, str(path), key)
    for spec in specs:
        _refuse_password(spec.url, f"endpoints.file: {path}")
    return specs


@dataclass(frozen=True, slots=True)
class Serving:
    """Endpoints that are up, and what they serve.

    Attributes:
        specs: The endpoints.
        model: The model's name.
        simulated: Whether they are simulated.
        absent: A line for each endpoint that did not answer, or is left out.
    """

    specs: tuple[EndpointSpec, ...]
    model: str
    simulated: bool
    absent: tuple[str, ...] = ()


@asynccontextmanager
async def serving(
    config: RunConfig, written: Mapping[str, Any], model: str | None = None
) -> AsyncIterator[Serving]:
    """Start the simulated fleet, or ask the configured endpoints what they serve.

    Args:
        config: The settings.
        written: The ``endpoints`` section as the user wrote it.
        model: The model's name when it was settled before; else the configured one.

    Raises:
        ConfigurationError: No endpoint answers, or none serves the model.
    """
    if config.endpoints.simulated is not None:
        spec = simulation(config)
        async with launch(spec) as fleet:
            yield Serving(tuple(map(EndpointSpec, fleet.urls)), spec.model, simulated=True)
    else:
        specs = endpoint_specs(config.endpoints, written)
        yield await survey(specs, model or config.model.name)


async def survey(specs: Sequence[EndpointSpec], model: str | None) -> Serving:
    """Ask endpoints what they serve (``/v1/models``), and check that it fits.

    Raises:
        ConfigurationError: No endpoint answers, none serves the model, the model is not
            settled, or simulated endpoints stand beside real ones.
    """
    found = await discover(specs, PROBE_TIMEOUT_S)
    settled = check_models(found, model)
    return Serving(settled.specs, settled.model, settled.simulated, tuple(_absent(found, settled)))


def _absent(found: Sequence[Found], settled: Checked) -> Iterator[str]:
    for one in found:
        if one.error:
            yield f"{one.label} does not answer yet: {one.error}"
        elif one.spec not in settled.specs:
            serves = ", ".join(one.models) or "nothing"
            yield f"{one.label} is left out: it serves {serves}, not {settled.model}"


@asynccontextmanager
async def open_fleet(config: RunConfig, serving: Serving) -> AsyncIterator[Fleet]:
    """Open the fleet over endpoints that are up; warn of those that are not."""
    for line in serving.absent[:_WARNED]:
        logger.warning("endpoint %s", line)
    if len(serving.absent) > _WARNED:
        logger.warning("… and %d more endpoints", len(serving.absent) - _WARNED)
    limits = config.limits
    policy = FleetPolicy.of(
        streams=limits.streams,
        attempts=limits.attempts,
        request_timeout_s=limits.request_timeout_s,
        fleet_wait_s=limits.fleet_wait_s,
    )
    if not limits.hedge:
        policy = replace(policy, hedge=None)
    async with Fleet(serving.specs, policy, simulated=serving.simulated) as fleet:
        yield fleet


def chat_fleet(fleet: Fleet, params: ModelParams) -> ChatFleet:
    """Return the fleet as a LangChain chat model."""
    return ChatFleet.of(fleet, params)


def chat_door(fleet: Fleet, params: ModelParams, traced: bool) -> FleetModel | LangChainModel:
    """Return the fleet's door for item graphs: LangChain's when calls are to be traced."""
    if traced:
        return LangChainModel(chat_fleet(fleet, params))
    return FleetModel(fleet, params)
