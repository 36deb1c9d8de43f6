"""Who writes the answers: responders by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeAlias

import orjson

from ...contract.errors import ConfigurationError
from .dice import Dice
from .esol import EsolResponder
from .questions import Question
from .spec import SimulationSpec
from .strings import prose


class Responder(Protocol):
    """Writes the answer to one question."""

    def __call__(self, question: Question) -> str:
        """Write an answer.

        Args:
            question: What is asked; ``question.key`` seeds all chance.

        Returns:
            The whole text; JSON where the form asks for it.

        Raises:
            ApiError: The question cannot be answered.
        """
        ...


class SchemaResponder:
    """Knows nothing: a value that conforms to the schema, or prose.

    Args:
        output_tokens: Least and most tokens of prose.
    """

    def __init__(self, output_tokens: tuple[int, int]) -> None:
        self._output_tokens = output_tokens

    def __call__(self, question: Question) -> str:
        """Write an answer; see `Responder`."""
        form, dice = question.form, Dice(question.key)
        if form.schema is not None:
            return compact(form.schema.draw(question.key))
        if form.choices:
            return form.choices[dice.below(len(form.choices))]
        if form.pattern is not None:
            return form.pattern(dice)
        return prose(dice, dice.between(*self._output_tokens))


ResponderFactory: TypeAlias = Callable[[SimulationSpec], Responder]


def _esol(spec: SimulationSpec) -> Responder:
    return EsolResponder(SchemaResponder(spec.output_tokens), spec.noise, spec.accuracy)


RESPONDERS: Final[Mapping[str, ResponderFactory]] = {
    "schema": lambda spec: SchemaResponder(spec.output_tokens),
    "esol": _esol,
}
"""The responders that fanfold brings; `SimulatedFleet` takes others as well."""


def make_responder(
    spec: SimulationSpec, responders: Mapping[str, ResponderFactory] = RESPONDERS
) -> Responder:
    """Make the responder that a specification names.

    Args:
        spec: The fleet's specification.
        responders: Factories by name.

    Returns:
        The responder, ready to answer.

    Raises:
        ConfigurationError: The name is unknown.
        MissingExtraError: The responder's packages are not installed.
    """
    factory = responders.get(spec.responder)
    if factory is None:
        raise ConfigurationError(
            f"simulated fleet: responder {spec.responder!r} is unknown; "
            f"known are {', '.join(sorted(responders))}"
        )
    return factory(spec)


def compact(value: Any) -> str:
    """Write JSON without spaces.

    Args:
        value: Any JSON value.

    Returns:
        Its text.
    """
    return orjson.dumps(value).decode()
