"""Selection of finished items: ``failed``, or comparisons such as ``output.score > 0.8``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any, Final

import orjson

from .errors import ConfigurationError
from .fields import FieldPath, Schema, resolve_field
from .types import Json, Row
from .values import STATUSES

_ORDERINGS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "<": lt,
    "<=": le,
    ">": gt,
    ">=": ge,
}
_STATUS: Final = re.compile(rf"\s*({'|'.join(STATUSES)})(?=\s+and\s|\s*$)")
_COMPARISON: Final = re.compile(
    r"""\s*([^\s=!<>"']+)\s*(==|!=|<=|>=|<|>)\s*("(?:[^"\\]|\\.)*"|'[^']*'|[^\s=!<>"']+)(?=\s|$)"""
)
_AND: Final = re.compile(r"\s+and\s+")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of a field with a constant.

    Attributes:
        field: The field.
        operator: ``==``, ``!=``, ``<``, ``<=``, ``>`` or ``>=``.
        value: The constant.
    """

    field: FieldPath
    operator: str
    value: Json

    def holds(self, output: Json, row: Row) -> bool:
        """Return True if an item fulfils it; a missing value is null, which has no order."""
        found = self.field.pick(output, row)
        if self.operator == "==":
            return _is_equal(found, self.value)
        if self.operator == "!=":
            return not _is_equal(found, self.value)
        has_order = (_is_number(found) and _is_number(self.value)) or (
            isinstance(found, str) and isinstance(self.value, str)
        )
        return has_order and _ORDERINGS[self.operator](found, self.value)


@dataclass(frozen=True, slots=True)
class Selection:
    """Conditions on finished items, all of which must hold.

    Attributes:
        text: The conditions as they were written.
        statuses: Statuses that an item must have.
        comparisons: Comparisons that must hold.
    """

    text: str
    statuses: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    @classmethod
    def parse(cls, text: str, answer: Schema | None, inputs: Schema) -> Selection:
        """Read conditions that are joined by ``and``.

        Args:
            text: The conditions.
            answer: Schema of the answers; None for free text.
            inputs: Schema of the input's rows.

        Raises:
            ConfigurationError: It is no such text, or a field does not exist.
        """
        statuses, comparisons, at = list[str](), list[Comparison](), 0
        while True:
            if (status := _STATUS.match(text, at)) is not None:
                statuses.append(status[1])
                end = status.end()
            elif (found := _COMPARISON.match(text, at)) is not None:
                name, operator, value = found.groups()
                field, _ = resolve_field(name, answer, inputs)
                comparisons.append(Comparison(field, operator, _read_value(value)))
                end = found.end()
            else:
                raise ConfigurationError(_explain(text, at))
            if not text[end:].strip():
                return cls(text, tuple(statuses), tuple(comparisons))
            joint = _AND.match(text, end)
            if joint is None:
                raise ConfigurationError(_explain(text, end))
            at = joint.end()

    def holds(self, status: str, output: Json, row: Row) -> bool:
        """Return True if a finished item fulfils all conditions."""
        return all(one == status for one in self.statuses) and all(
            one.holds(output, row) for one in self.comparisons
        )


def _explain(text: str, at: int) -> str:
    rest = text[at:].strip() or "its end"
    return (
        f"{text!r} cannot be read at {rest!r}: write 'failed', 'done', or FIELD OPERATOR VALUE "
        "with an operator of == != < <= > >=, e.g. \"output.score > 0.8 and input.kind == 'a'\""
    )


def _read_value(text: str) -> Json:
    """Return a constant: JSON, a text in single quotes, or a word."""
    if text.startswith("'"):
        return text[1:-1]
    try:
        value: Json = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    return value


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_equal(a: Json, b: Json) -> bool:
    """Compare as JSON does: true is not 1."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b
