"""Random values that conform to a JSON Schema."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, Final, TypeVar

import orjson

from ..core.parsing import resolve_reference
from .values import FORMATS, ApiError, SeededRandom, compile_pattern, draw_text

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
    """Refuse a schema with a keyword that the generator does not support.

    Words outside JSON Schema's vocabulary are annotations and are ignored.

    Raises:
        ApiError: 400; the message names the keyword and its position.
    """
    waiting = [("#", schema)]
    while waiting:
        where, part = waiting.pop()
        if isinstance(part, dict):
            _check_one(where, part)
            waiting.extend(_parts(where, part))
        elif not isinstance(part, bool):
            raise _unsupported_error(where, "a schema must be an object or a boolean")


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
        raise _unsupported_error(where, f"the keyword '{word}' is not supported")
    if not str(schema.get("$ref", "#")).startswith("#"):
        raise _unsupported_error(where, "'$ref' must point into the same schema")
    if isinstance(schema.get("items"), list):
        raise _unsupported_error(where, "a list of 'items' is not supported; use 'prefixItems'")
    for word in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(word), bool):
            raise _unsupported_error(where, f"'{word}' must be a number")
    if schema.get("format", "date") not in FORMATS:
        raise _unsupported_error(where, f"the format '{schema['format']}' is not supported")
    if "pattern" in schema:
        compile_pattern(str(schema["pattern"]))
    _check_sizes(where, schema)


def _check_sizes(where: str, schema: dict[str, Any]) -> None:
    limits = dict.fromkeys(_SIZES, _LARGEST) | {"minLength": _LONGEST}
    for word, most in limits.items():
        size = schema.get(word, 0)
        if not isinstance(size, int | float) or size > most:
            raise _unsupported_error(where, f"'{word}' must be a number of at most {most}")


def _unsupported_error(where: str, why: str) -> ApiError:
    return ApiError(f"The JSON schema cannot be simulated: {why} (at {where}).", param=PARAM)


def follow_reference(root: Any, reference: str) -> Any:
    """Return the part of the whole schema that a reference names.

    Raises:
        ApiError: The reference does not exist.
    """
    try:
        return resolve_reference(root, reference)
    except LookupError as error:
        raise ApiError(str(error), param=PARAM) from None


def min_depth(root: Any, schema: Any, seen: tuple[str, ...] = ()) -> float:
    """Estimate the depth of the shallowest value of a schema.

    Args:
        root: The whole schema.
        schema: The part in question.
        seen: References followed so far.

    Returns:
        Number of levels; infinity if every value is endless.
    """
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return 0.0
    choices = [schema[word] for word in ("anyOf", "oneOf") if schema.get(word)]
    inner = [0.0, *(min(min_depth(root, part, seen) for part in parts) for parts in choices)]
    if reference := schema.get("$ref"):
        if reference in seen:
            return float("inf")
        inner.append(min_depth(root, follow_reference(root, reference), (*seen, reference)))
    properties = schema.get("properties", {})
    needed = [properties[name] for name in schema.get("required", ()) if name in properties]
    needed += schema.get("allOf", ())
    if schema.get("minItems", 0) > 0:
        needed += [schema.get("items", True), *schema.get("prefixItems", ())]
    return max(inner + [1 + min_depth(root, part, seen) for part in needed])


def merge_schemas(one: Mapping[str, Any], other: Any) -> dict[str, Any]:
    """Merge two schemas that both must hold.

    Args:
        one: A schema.
        other: Another schema; may be a boolean.

    Raises:
        ApiError: A keyword has different values that cannot be merged.
    """
    if other is True or one == other:
        return dict(one)
    if other is False:
        return {"enum": []}
    joined = dict(one)
    for word, value in other.items():
        joined[word] = value if word not in one else _join(word, one[word], value)
    return joined


def _join(word: str, one: Any, other: Any) -> Any:
    if one == other or word in _ANNOTATIONS:
        return other
    joiner = _JOINERS.get(word)
    if joiner is None:
        raise ApiError(f"The JSON schema combines two different '{word}'.", param=PARAM)
    return joiner(one, other)


def _join_named(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    shared = {k: merge_schemas(_schema(one[k]), other[k]) for k in one.keys() & other.keys()}
    return {**one, **other, **shared}


def _join_parts(one: Any, other: Any) -> Any:
    return False if one is False or other is False else merge_schemas(_schema(one), other)


_ANNOTATIONS: Final = frozenset(
    ["title", "description", "default", "examples", "$comment", "$id", "$schema"]
)


def _schema(part: Any) -> dict[str, Any]:
    if isinstance(part, bool):
        return {} if part else {"enum": []}
    return dict(part)


def _join_types(one: Any, other: Any) -> list[str]:
    ones = one if isinstance(one, list) else [one]
    others = set(other if isinstance(other, list) else [other])
    if "number" in others:
        others.add("integer")
    both = [kind for kind in ones if kind in others]
    if "number" in ones and "integer" in others and "integer" not in both:
        both.append("integer")
    return both


_JOINERS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "required": lambda one, other: [*one, *(name for name in other if name not in one)],
    "enum": lambda one, other: [value for value in one if value in other],
    "type": _join_types,
    **dict.fromkeys(("properties", "$defs", "definitions"), _join_named),
    **dict.fromkeys(("items", "additionalProperties"), _join_parts),
    **dict.fromkeys(("minimum", "exclusiveMinimum"), max),
    **dict.fromkeys(("minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum"), min),
    **dict.fromkeys(("maxLength", "maxItems", "maxProperties"), min),
}


_RANGE: Final = 100
"""Width of an interval that the schema leaves open."""
_DIGITS: Final = 4

_Number = TypeVar("_Number", float, Fraction)


def _exact(written: float) -> Fraction:
    return Fraction(str(written))  # the decimal number, not its binary approximation


def _bounds(
    schema: Mapping[str, Any], width: _Number, read: Callable[[float], _Number]
) -> tuple[_Number, _Number]:
    """Return the closed interval that the bounds allow."""
    lows = [read(schema[k]) for k in ("minimum", "exclusiveMinimum") if k in schema]
    highs = [read(schema[k]) for k in ("maximum", "exclusiveMaximum") if k in schema]
    if not lows:
        lows = [min(read(0), highs[0] - width)] if highs else [read(0)]
    return max(lows), min(highs) if highs else max(lows) + width


def _step(schema: Mapping[str, Any], whole: bool) -> Fraction:
    """Return the distance between allowed values; 0 if there is none."""
    step = _exact(schema["multipleOf"]) if "multipleOf" in schema else Fraction(int(whole))
    return Fraction(step.numerator) if whole else step


def _draw_multiple(dice: SeededRandom, schema: Mapping[str, Any], step: Fraction) -> Fraction:
    low, high = _bounds(schema, max(Fraction(_RANGE), step * _RANGE), _exact)
    first, last = math.ceil(low / step), math.floor(high / step)
    if "exclusiveMinimum" in schema and first * step <= _exact(schema["exclusiveMinimum"]):
        first += 1
    if "exclusiveMaximum" in schema and last * step >= _exact(schema["exclusiveMaximum"]):
        last -= 1
    if last < first:
        raise ApiError("The schema's bounds allow no number.", param="response_format")
    return dice.between(first, last) * step


def draw_integer(dice: SeededRandom, schema: Mapping[str, Any]) -> int:
    """Draw an integer within the schema's bounds.

    Raises:
        ApiError: The bounds allow no integer.
    """
    return int(_draw_multiple(dice, schema, _step(schema, whole=True)))


def draw_number(dice: SeededRandom, schema: Mapping[str, Any]) -> float:
    """Draw a number within the schema's bounds, with four decimals where they allow it.

    Raises:
        ApiError: The bounds allow no number.
    """
    if "multipleOf" in schema:
        return float(_draw_multiple(dice, schema, _step(schema, whole=False)))
    low, high = _bounds(schema, float(_RANGE), float)
    share = dice.uniform()
    drawn = low * (1 - share) + high * share  # not low + (high - low) * share: may overflow
    drawn = min(max(drawn, low), high)  # rounding may leave narrow bounds
    rounded = round(drawn, _DIGITS)
    return rounded if low < rounded < high else drawn


MAX_OPTIONAL_DEPTH: Final = 6
"""Depth below which everything optional is omitted."""
_BOTTOM: Final = 40
_VALUES: Final = 20_000
_REDRAWS: Final = 50
_ITEMS: Final = 3

_COMBINING: Final = frozenset(["$ref", "allOf", "anyOf", "oneOf"])
_HINTS: Final = (
    ("object", ("properties", "required", "additionalProperties", "minProperties")),
    ("array", ("items", "prefixItems", "minItems", "maxItems", "uniqueItems")),
    ("string", ("pattern", "format", "minLength", "maxLength")),
    ("number", ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
)


class ValueGenerator:
    """Generator of values for one schema.

    Args:
        root: The whole schema, into which ``$ref`` points.
        dice: The random source.
    """

    def __init__(self, root: Any, dice: SeededRandom) -> None:
        self._root = root
        self._dice = dice
        self._budget = _VALUES

    def draw(self, schema: Any, depth: int = 0) -> Any:
        """Draw a value.

        Args:
            schema: The part of the schema that the value must satisfy.
            depth: Depth of the part.

        Raises:
            ApiError: The schema allows no value, or only endless ones.
        """
        self._budget -= 1
        if depth > _BOTTOM or self._budget < 0:
            raise ApiError("The JSON schema asks for an endless answer.", param=PARAM)
        if isinstance(schema, bool):
            if not schema:
                raise ApiError("The JSON schema allows no answer.", param=PARAM)
            return draw_text(self._dice, 0, None)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._pick(schema["enum"])
        if combined := self._combined(schema, depth):
            return self.draw(combined, depth + 1)
        return self._typed(schema, depth)

    def _pick(self, choices: list[Any]) -> Any:
        if not choices:
            raise ApiError("The JSON schema allows no answer.", param=PARAM)
        return choices[self._dice.below(len(choices))]

    def _combined(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any] | None:
        """Merge references and chosen branches into their siblings; None if there are none."""
        if not schema.keys() & _COMBINING:
            return None
        plain = {k: v for k, v in schema.items() if k not in _COMBINING}
        parts = [*schema.get("allOf", ())]
        if "$ref" in schema:
            parts.append(follow_reference(self._root, schema["$ref"]))
        branches = [schema[word] for word in ("anyOf", "oneOf") if word in schema]
        parts += [self._branch(choices, depth) for choices in branches]
        for part in parts:
            plain = merge_schemas(plain, part)
        return plain

    def _branch(self, branches: list[Any], depth: int) -> Any:
        if depth < MAX_OPTIONAL_DEPTH or not branches:
            return self._pick(branches)
        return min(branches, key=lambda branch: min_depth(self._root, branch))

    def _typed(self, schema: Mapping[str, Any], depth: int) -> Any:
        kind = schema.get("type") or next(
            (name for name, words in _HINTS if any(word in schema for word in words)), "string"
        )
        if isinstance(kind, list):
            kind = (
                self._pick(kind)
                if depth < MAX_OPTIONAL_DEPTH
                else min(kind, key=_WEIGHT.__getitem__)
            )
        if kind == "object":
            return self._object(schema, depth + 1)
        if kind == "array":
            return self._array(schema, depth + 1)
        return self._string(schema) if kind == "string" else self._scalar(kind, schema)

    def _scalar(self, kind: str, schema: Mapping[str, Any]) -> float | bool | None:
        if kind == "integer":
            return draw_integer(self._dice, schema)
        if kind == "number":
            return draw_number(self._dice, schema)
        return self._dice.coin() if kind == "boolean" else None

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        properties: dict[str, Any] = schema.get("properties", {})
        required = schema.get("required", ())
        others = schema.get("additionalProperties", True)
        least, most = int(schema.get("minProperties", 0)), schema.get("maxProperties", _VALUES)
        optional = [name for name in properties if name not in required]
        chosen = {name for name in optional if depth <= MAX_OPTIONAL_DEPTH and self._dice.coin()}
        for name in optional:
            if len(chosen) + len(required) < least:
                chosen.add(name)
            elif len(chosen) + len(required) > most:
                chosen.discard(name)
        names = [name for name in properties if name in chosen or name in required]
        names += [name for name in required if name not in properties]
        names += [f"extra_{n}" for n in range(1, least - len(names) + 1)]
        return {name: self.draw(properties.get(name, others), depth) for name in names}

    def _array(self, schema: Mapping[str, Any], depth: int) -> list[Any]:
        prefix, items = schema.get("prefixItems", []), schema.get("items", True)
        least = int(schema.get("minItems", 0))
        usual = max(least, 1) if depth <= MAX_OPTIONAL_DEPTH else least
        most = int(schema.get("maxItems", max(usual, _ITEMS)))
        if items is False:
            most = min(most, len(prefix))
        count = least if depth > MAX_OPTIONAL_DEPTH else self._dice.between(min(usual, most), most)
        drawn: list[Any] = []
        for index in range(count):
            part = prefix[index] if index < len(prefix) else items
            drawn.append(self._item(part, depth, drawn if schema.get("uniqueItems") else []))
        return drawn

    def _item(self, schema: Any, depth: int, others: list[Any]) -> Any:
        taken = {orjson.dumps(other, option=orjson.OPT_SORT_KEYS) for other in others}
        for _ in range(_REDRAWS):
            drawn = self.draw(schema, depth)
            if orjson.dumps(drawn, option=orjson.OPT_SORT_KEYS) not in taken:
                return drawn
        raise ApiError("The JSON schema asks for more distinct items than exist.", param=PARAM)

    def _string(self, schema: Mapping[str, Any]) -> str:
        if "format" in schema:
            return FORMATS[schema["format"]](self._dice)
        if "pattern" in schema:
            return compile_pattern(schema["pattern"])(self._dice)
        most = schema.get("maxLength")
        least = int(schema.get("minLength", 0))
        return draw_text(self._dice, least, None if most is None else int(most))


_WEIGHT: Final = {
    "null": 0, "boolean": 1, "integer": 2, "number": 3, "string": 4, "array": 5, "object": 6,
}  # fmt: skip
