"""Which of the endpoints found serve the run's model, and under which id each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ..fleet.address import EndpointSpec
from .probe import Found, check_models

_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Matched:
    """Endpoints that agree with the run.

    Attributes:
        model: The model's name.
        specs: Endpoints that serve it, and those that did not answer yet.
        simulated: Whether they are a simulated fleet.
        absent: A line for each endpoint that did not answer, or is left out.
        ready: How many answer and serve it.
    """

    model: str
    specs: tuple[EndpointSpec, ...]
    simulated: bool
    absent: tuple[str, ...]
    ready: int


def match(found: Sequence[Found], name: str | None, names: Mapping[str, str]) -> Matched:
    """Settle on one model, and on the id by which each endpoint knows it.

    An endpoint that its list tags with a model (``model=…``) is held to it.

    Args:
        found: What the endpoints said.
        name: The model's name, or None for the only one that all serve.
        names: Served id to model's name, where they differ.

    Raises:
        ConfigurationError: No endpoint answers, none serves the model, the model is not
            settled, or simulated endpoints stand beside real ones.
    """
    settled = check_models([_translated(one, names) for one in found], name)
    matches = [_matching(one, names, settled.model) for one in found]
    return Matched(
        settled.model,
        tuple(spec for spec in matches if spec is not None),
        settled.simulated,
        tuple(_absent(found, matches, settled.model)),
        sum(s is not None and one.reachable for one, s in zip(found, matches, strict=True)),
    )


def _translated(found: Found, names: Mapping[str, str]) -> Found:
    """Put the run's names in place of the served ids."""
    return replace(
        found,
        spec=replace(found.spec, model=None),
        models=tuple(dict.fromkeys(names.get(i, i) for i in _offered(found))),
    )


def _offered(found: Found) -> list[str]:
    return [i for i in found.models if found.spec.model in {None, i}]


def _matching(found: Found, names: Mapping[str, str], model: str) -> EndpointSpec | None:
    """Return the endpoint with its id of the model, or None when it does not serve it."""
    offered = _offered(found)
    if not found.reachable:
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
    found: Sequence[Found], matches: Sequence[EndpointSpec | None], model: str
) -> Iterator[str]:
    for one, spec in zip(found, matches, strict=True):
        if spec is None:
            serves = ", ".join(one.models[:_SHOWN]) or one.spec.model or "nothing"
            tag = f" (tagged {one.spec.model})" if one.spec.model else ""
            yield f"{one.label} is left out: it serves {serves}{tag}, not {model}"
        elif one.error:
            yield f"{one.label} does not answer yet: {one.error}"
