"""From settings to a simulated fleet."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from ...configs.models import RunConfig
from ..core.errors import ConfigurationError, MissingExtraError
from .responders import RESPONDERS
from .rules import FaultRule
from .spec import SimulationSpec


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
