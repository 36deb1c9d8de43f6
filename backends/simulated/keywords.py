"""Which words of JSON Schema the simulated fleet understands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from .errors import ApiError
from .strings import FORMATS
from .values import pattern_maker

PARAM: Final = "response_format"

_BEYOND: Final = (
    "not if then else dependentRequired dependentSchemas dependencies patternProperties "
    "propertyNames contains minContains maxContains unevaluatedItems unevaluatedProperties "
    "additionalItems $dynamicRef $recursiveRef $anchor $dynamicAnchor"
)
_UNSUPPORTED: Final = frozenset(_BEYOND.split())
_ONE: Final = ("items", "additionalProperties")
_MANY: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED: Final = ("properties", "$defs", "definitions")
_SIZES: Final = ("minItems", "minProperties")
_LARGEST: Final = 1_000
_LONGEST: Final = 100_000


def check_keywords(schema: Any) -> None:
    """Refuse a schema that needs a word which the walker does not know.

    Words outside JSON Schema's vocabulary are annotations, and as such ignored.

    Args:
        schema: A schema: an object or a boolean.

    Raises:
        ApiError: 400, with the word and its place.
    """
    waiting = [("#", schema)]
    while waiting:
        where, part = waiting.pop()
        if isinstance(part, dict):
            _check_one(where, part)
            waiting.extend(_parts(where, part))
        elif not isinstance(part, bool):
            raise _refused(where, "a schema must be an object or a boolean")


def _parts(where: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for word in _ONE:
        if word in schema:
            yield f"{where}/{word}", schema[word]
    for word in _MANY:
        for number, part in enumerate(schema.get(word, ())):
            yield f"{where}/{word}/{number}", part
    for word in _NAMED:
        for name, part in schema.get(word, {}).items():
            yield f"{where}/{word}/{name}", part


def _check_one(where: str, schema: dict[str, Any]) -> None:
    for word in schema.keys() & _UNSUPPORTED:
        raise _refused(where, f"the keyword '{word}' is not supported")
    if not str(schema.get("$ref", "#")).startswith("#"):
        raise _refused(where, "'$ref' must point into the same schema")
    if isinstance(schema.get("items"), list):
        raise _refused(where, "a list of 'items' is not supported; use 'prefixItems'")
    for word in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(word), bool):
            raise _refused(where, f"'{word}' must be a number")
    if schema.get("format", "date") not in FORMATS:
        raise _refused(where, f"the format '{schema['format']}' is not supported")
    if "pattern" in schema:
        pattern_maker(str(schema["pattern"]))
    _check_sizes(where, schema)


def _check_sizes(where: str, schema: dict[str, Any]) -> None:
    limits = dict.fromkeys(_SIZES, _LARGEST) | {"minLength": _LONGEST}
    for word, most in limits.items():
        size = schema.get(word, 0)
        if not isinstance(size, int | float) or size > most:
            raise _refused(where, f"'{word}' must be a number of at most {most}")


def _refused(where: str, why: str) -> ApiError:
    return ApiError(f"The JSON schema cannot be simulated: {why} (at {where}).", param=PARAM)
