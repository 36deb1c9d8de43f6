"""A value that conforms to a JSON Schema, drawn from a key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from .dice import Dice
from .errors import ApiError
from .keywords import PARAM
from .merging import height, merge, resolve
from .numbers import integer, number
from .strings import FORMATS, text
from .values import pattern_maker

DEPTH: Final = 6
"""Below this depth everything optional is left out."""
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


class Walker:
    """One walk over one schema.

    Args:
        root: The whole schema, into which ``$ref`` points.
        dice: The source of chance.
    """

    def __init__(self, root: Any, dice: Dice) -> None:
        self._root = root
        self._dice = dice
        self._budget = _VALUES

    def value(self, schema: Any, depth: int = 0) -> Any:
        """Draw a value.

        Args:
            schema: The part of the schema that the value must satisfy.
            depth: How deep the part lies.

        Returns:
            The value.

        Raises:
            ApiError: The schema allows no value, or only endless ones.
        """
        self._budget -= 1
        if depth > _BOTTOM or self._budget < 0:
            raise ApiError("The JSON schema asks for an endless answer.", param=PARAM)
        if isinstance(schema, bool):
            if not schema:
                raise ApiError("The JSON schema allows no answer.", param=PARAM)
            return text(self._dice, 0, None)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._pick(schema["enum"])
        if combined := self._combined(schema, depth):
            return self.value(combined, depth + 1)
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
            parts.append(resolve(self._root, schema["$ref"]))
        branches = [schema[word] for word in ("anyOf", "oneOf") if word in schema]
        parts += [self._branch(choices, depth) for choices in branches]
        for part in parts:
            plain = merge(plain, part)
        return plain

    def _branch(self, branches: list[Any], depth: int) -> Any:
        if depth < DEPTH or not branches:
            return self._pick(branches)
        return min(branches, key=lambda branch: height(self._root, branch))

    def _typed(self, schema: Mapping[str, Any], depth: int) -> Any:
        kind = schema.get("type") or next(
            (name for name, words in _HINTS if any(word in schema for word in words)), "string"
        )
        if isinstance(kind, list):
            kind = self._pick(kind) if depth < DEPTH else min(kind, key=_WEIGHT.__getitem__)
        if kind == "object":
            return self._object(schema, depth + 1)
        if kind == "array":
            return self._array(schema, depth + 1)
        return self._string(schema) if kind == "string" else self._scalar(kind, schema)

    def _scalar(self, kind: str, schema: Mapping[str, Any]) -> float | bool | None:
        if kind == "integer":
            return integer(self._dice, schema)
        if kind == "number":
            return number(self._dice, schema)
        return self._dice.coin() if kind == "boolean" else None

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        properties: dict[str, Any] = schema.get("properties", {})
        required = schema.get("required", ())
        others = schema.get("additionalProperties", True)
        least, most = int(schema.get("minProperties", 0)), schema.get("maxProperties", _VALUES)
        optional = [name for name in properties if name not in required]
        chosen = {name for name in optional if depth <= DEPTH and self._dice.coin()}
        for name in optional:
            if len(chosen) + len(required) < least:
                chosen.add(name)
            elif len(chosen) + len(required) > most:
                chosen.discard(name)
        names = [name for name in properties if name in chosen or name in required]
        names += [name for name in required if name not in properties]
        names += [f"extra_{n}" for n in range(1, least - len(names) + 1)]
        return {name: self.value(properties.get(name, others), depth) for name in names}

    def _array(self, schema: Mapping[str, Any], depth: int) -> list[Any]:
        prefix, items = schema.get("prefixItems", []), schema.get("items", True)
        least = int(schema.get("minItems", 0))
        usual = max(least, 1) if depth <= DEPTH else least
        most = int(schema.get("maxItems", max(usual, _ITEMS)))
        if items is False:
            most = min(most, len(prefix))
        count = least if depth > DEPTH else self._dice.between(min(usual, most), most)
        drawn: list[Any] = []
        for place in range(count):
            part = prefix[place] if place < len(prefix) else items
            drawn.append(self._item(part, depth, drawn if schema.get("uniqueItems") else []))
        return drawn

    def _item(self, schema: Any, depth: int, others: list[Any]) -> Any:
        taken = {orjson.dumps(other, option=orjson.OPT_SORT_KEYS) for other in others}
        for _ in range(_REDRAWS):
            drawn = self.value(schema, depth)
            if orjson.dumps(drawn, option=orjson.OPT_SORT_KEYS) not in taken:
                return drawn
        raise ApiError("The JSON schema asks for more distinct items than exist.", param=PARAM)

    def _string(self, schema: Mapping[str, Any]) -> str:
        if "format" in schema:
            return FORMATS[schema["format"]](self._dice)
        if "pattern" in schema:
            return pattern_maker(schema["pattern"])(self._dice)
        most = schema.get("maxLength")
        least = int(schema.get("minLength", 0))
        return text(self._dice, least, None if most is None else int(most))


_WEIGHT: Final = {
    "null": 0, "boolean": 1, "integer": 2, "number": 3, "string": 4, "array": 5, "object": 6,
}  # fmt: skip
