"""Who writes the answers: responders by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import orjson

from ..core.errors import ConfigurationError
from .answers import SchemaCache
from .dice import Dice
from .esol import EsolResponder, find_smiles
from .requests import Question
from .spec import SimulationSpec
from .strings import prose


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The answer of a model that calls a function, where the request leaves it the choice.

    Attributes:
        name: The function; one of ``question.tools``.
        arguments: Its arguments.
    """

    name: str
    arguments: Mapping[str, Any]


class Responder(Protocol):
    """Writes the answer to one question."""

    def __call__(self, question: Question) -> str | ToolUse:
        """Write an answer.

        Args:
            question: What is asked; ``question.key`` seeds all chance.

        Returns:
            The whole text, JSON where the form asks for it; or the call of a function.

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


class AgentResponder:
    """Calls each function on offer once, in their order, and then answers.

    Arguments are drawn; those called ``smiles`` are the molecule that the conversation names.

    Args:
        fallback: Answers at the end, and draws what a form asks for.
    """

    def __init__(self, fallback: SchemaResponder) -> None:
        self._fallback = fallback
        self._schemas = SchemaCache()

    def __call__(self, question: Question) -> str | ToolUse:
        """Write an answer, or call the next function; see `Responder`."""
        used = _used(question.messages)
        left = [tool for tool in question.tools if tool.get("name") not in used]
        if not left and question.form.tool is not None:
            left = [question.tools[-1]]  # one must be called, and the last one often ends a task
        if not left:
            return self._fallback(question)
        schema = left[0].get("parameters") or {"type": "object"}
        arguments = self._schemas.get(schema).draw(question.key)
        if "smiles" in arguments:
            arguments["smiles"] = find_smiles(question.messages)
        return ToolUse(str(left[0].get("name")), arguments)


def _used(messages: list[dict[str, Any]]) -> set[str]:
    """Return the functions called since the user spoke last."""
    used = set[str]()
    for message in messages:
        if message.get("role") == "user":
            used.clear()
        for call in message.get("tool_calls") or ():
            used.add(str(call.get("function", {}).get("name")))
    return used


RESPONDERS: Final[Mapping[str, ResponderFactory]] = {
    "schema": lambda spec: SchemaResponder(spec.output_tokens),
    "esol": _esol,
    "agent": lambda spec: AgentResponder(SchemaResponder(spec.output_tokens)),
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
