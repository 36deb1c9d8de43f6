"""Aggregators as commutative monoids: protocol, parameters, values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import lru_cache
from math import isfinite
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

from ...backends.core.errors import ConfigurationError
from ...backends.core.fields import FieldPath
from ...backends.core.types import Json, Outcome

State: TypeAlias = dict[str, Json]
"""The folded outcomes of an aggregator: JSON-safe, bounded in size; only ``add`` changes one.

``of`` names the aggregator and its parameters, so that states combine without a configuration.
Integers stay below 2**63 (larger ones are hexadecimal text), because checkpoints contain states.
"""


class Aggregator:
    """An aggregator: a commutative monoid over outcomes, and a readable form of its sum.

    The subclasses are frozen dataclasses whose fields are the parameters.

    Attributes:
        op: Its name in the configuration.
    """

    __slots__ = ()
    op: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def empty(self) -> State:
        """Return the state of no outcomes, the identity of ``combine``."""
        raise NotImplementedError

    def add(self, state: State, outcomes: Sequence[Outcome]) -> None:
        """Add a batch of outcomes to a state, which it changes.

        Its cost depends on the batch, not on what the state has.

        Args:
            state: A state that nothing else uses; ``of`` may be absent.
            outcomes: The outcomes.
        """
        raise NotImplementedError

    def lift(self, outcomes: Sequence[Outcome]) -> State:
        """Return the state of a batch of outcomes."""
        state = self.empty()
        self.add(state, outcomes)
        return state

    @staticmethod
    def combine(a: State, b: State) -> State:
        """Return the state of the outcomes of both, computed from the two states alone."""
        raise NotImplementedError

    def present(self, state: State) -> dict[str, Json]:
        """Return the readable, JSON-safe result; equal sets of outcomes give equal results."""
        raise NotImplementedError

    def to_spec(self) -> dict[str, Json]:
        """Return the parameters as states contain them, tuples as lists."""
        spec: dict[str, Json] = {"op": self.op}
        for about in fields(self):
            if about.init and about.name not in SHOWN:
                value = getattr(self, about.name)
                spec[about.name] = list(value) if isinstance(value, tuple) else value
        return spec

    def parameter_error(self, name: str, demand: str) -> ConfigurationError:
        """Return the error for a parameter ``name`` that does not meet ``demand``."""
        return ConfigurationError(
            f"reduce: {self.op}.{name} is {getattr(self, name)!r}; it must be {demand}"
        )


SHOWN: Final = ("categories",)
"""Parameters that change only how results are shown; states do not contain them."""

AggregatorT = TypeVar("AggregatorT", bound=Aggregator)


def make_aggregator(kind: type[AggregatorT], spec: Mapping[str, Json]) -> AggregatorT:
    """Make an aggregator from its dict in the configuration.

    Args:
        kind: The aggregator's class.
        spec: ``op`` and the parameters.

    Returns:
        The aggregator.

    Raises:
        ConfigurationError: A parameter is unknown, missing or out of range.
    """
    given = {name: _freeze(value) for name, value in spec.items() if name != "op"}
    known = {f.name: f for f in fields(kind) if f.init}
    if unknown := sorted(given.keys() - known.keys()):
        names = ", ".join(known) or "none"
        raise ConfigurationError(
            f"reduce: {kind.op} has no parameter '{unknown[0]}'; its parameters: {names}"
        )
    needed = [n for n, f in known.items() if f.default is MISSING and n not in given]
    if needed:
        raise ConfigurationError(f"reduce: {kind.op} needs '{needed[0]}'")
    return kind(**given)


def add_counts(total: dict[str, int], more: Mapping[str, int]) -> None:
    """Add a tally to another one, which it changes."""
    for key, count in more.items():
        total[key] = total.get(key, 0) + count


def sum_counts(*counts: Mapping[str, int]) -> dict[str, int]:
    """Return the sum of several tallies, key by key."""
    total: dict[str, int] = dict(counts[0]) if counts else {}
    for more in counts[1:]:
        add_counts(total, more)
    return total


def done_outcomes(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the outcomes that have an output."""
    return [outcome for outcome in outcomes if outcome.status == "done"]


def _freeze(value: Json) -> Json:
    return tuple(value) if isinstance(value, list) else value


SHOWN_CHARACTERS: Final = 2_000
"""Longer texts are cut in states, which carry them only for display."""

MAX_STATE_DEPTH: Final = 100
"""Deeper values would break writers, whose limits begin at some 250 levels."""

_INT64: Final = 1 << 63


parse_field = lru_cache(maxsize=256)(FieldPath.parse)
"""Returns the field of a name; aggregators ask for it once per batch and group."""


def pick_values(field: str, outcomes: Iterable[Outcome]) -> list[Json]:
    """Return the value of a field of each outcome, or None where there is none."""
    path = parse_field(field)
    pick = path.pick_all if path.is_many else path.pick_one
    return [pick(outcome.output, outcome.row) for outcome in outcomes]


ValueT = TypeVar("ValueT")


def pick_usable(
    field: str, outcomes: Sequence[Outcome], convert: Callable[[Json], ValueT | None]
) -> tuple[list[ValueT], State]:
    """Return the usable values of a field, and counts of the outcomes without one.

    Args:
        field: Name of the field.
        outcomes: Outcomes with an output.
        convert: Returns a value in the form that is used, or None if it is not usable.

    Returns:
        The values, and the part of a state that :func:`sum_missing` combines: ``missing``; with
        values in the elements of a list also ``items``, the number of outcomes that have one.
    """
    path = parse_field(field)
    if not path.is_many:
        found = [convert(path.pick_one(outcome.output, outcome.row)) for outcome in outcomes]
        values = [value for value in found if value is not None]
        return values, {"missing": len(found) - len(values)}
    values, items = [], 0
    for outcome in outcomes:
        known = len(values)
        for value in path.pick_all(outcome.output, outcome.row):
            if (usable := convert(value)) is not None:
                values.append(usable)
        items += len(values) > known
    return values, {"missing": len(outcomes) - items, "items": items}


def no_missing(field: str) -> State:
    """Return the part of an empty state to which :func:`add_counts` adds what is missing."""
    return {"missing": 0, "items": 0} if parse_field(field).is_many else {"missing": 0}


def sum_missing(a: State, b: State) -> State:
    """Return the sum of two parts of states that :func:`pick_usable` made."""
    return {name: a[name] + b[name] for name in ("missing", "items") if name in a}


def show_missing(state: State) -> dict[str, Json]:
    """Return a part of a state that :func:`pick_usable` made, as results show it."""
    return {name: state[name] for name in ("items", "missing") if name in state}


def finite_number(value: Json) -> int | float | None:
    """Return a finite number that a state can carry, or None for anything else.

    Booleans are not numbers. Integers outside 64 bits become the nearest double; beyond the range
    of doubles they are not finite.
    """
    kind = value.__class__
    if kind is float:
        return float(value) if isfinite(value) else None
    if kind is not int:
        return None
    if -_INT64 <= value < _INT64:
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return None


def to_countable(value: Json, longest: int = SHOWN_CHARACTERS) -> str | bool | int | float | None:
    """Return a value that can be counted, None for others: 1.0 is 1, and long texts are cut.

    Integers outside 64 bits, which may be ids, stay different: as hexadecimal text.

    Args:
        value: Any JSON value.
        longest: Cut texts to this many characters.
    """
    if isinstance(value, str):
        return _text(value, longest)
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        return _text(hex(value), longest)
    known = finite_number(value)
    return finite_number(int(known)) if isinstance(known, float) and known.is_integer() else known


def sanitize_json(value: Json, longest: int | None = None, depth: int = MAX_STATE_DEPTH) -> Json:
    """Return a copy of a JSON value that survives every JSON and msgpack writer.

    Non-finite floats become None, integers outside 64 bits hexadecimal text, lone surrogates
    question marks, and values nested too deep an ellipsis.

    Args:
        value: Any JSON value.
        longest: Cut texts to this many characters, or None.
        depth: Most levels of lists and objects.
    """
    if isinstance(value, str):
        return _text(value, longest)
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, int):
        return value if -_INT64 <= value < _INT64 else hex(value)
    if isinstance(value, dict | list | tuple):
        return _nested(value, longest, depth - 1) if depth else "…"
    return value


def _nested(value: Json, longest: int | None, depth: int) -> Json:
    if isinstance(value, dict):
        return {_text(str(k), longest): sanitize_json(v, longest, depth) for k, v in value.items()}
    return [sanitize_json(item, longest, depth) for item in value]


def _text(text: str, longest: int | None) -> str:
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "…"
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
