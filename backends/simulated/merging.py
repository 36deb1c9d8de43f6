"""Parts of a JSON Schema: following references, joining two, and how deep they go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from .errors import ApiError
from .keywords import PARAM


def resolve(root: Any, reference: str) -> Any:
    """Follow a JSON pointer within the schema (RFC 6901).

    Args:
        root: The whole schema.
        reference: ``#`` or ``#/...``.

    Returns:
        The part that it names.

    Raises:
        ApiError: It names nothing.
    """
    part = root
    for step in reference.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        try:
            part = part[int(name)] if isinstance(part, list) else part[name]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ApiError(f"The reference {reference!r} leads nowhere.", param=PARAM) from None
    return part


def height(root: Any, schema: Any, seen: tuple[str, ...] = ()) -> float:
    """Estimate how deep the shallowest value of a schema is.

    Args:
        root: The whole schema.
        schema: The part in question.
        seen: References followed so far.

    Returns:
        Levels; infinity where every value is endless.
    """
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return 0.0
    choices = [schema[word] for word in ("anyOf", "oneOf") if schema.get(word)]
    inner = [0.0, *(min(height(root, part, seen) for part in parts) for parts in choices)]
    if reference := schema.get("$ref"):
        if reference in seen:
            return float("inf")
        inner.append(height(root, resolve(root, reference), (*seen, reference)))
    properties = schema.get("properties", {})
    needed = [properties[name] for name in schema.get("required", ()) if name in properties]
    needed += schema.get("allOf", ())
    if schema.get("minItems", 0) > 0:
        needed += [schema.get("items", True), *schema.get("prefixItems", ())]
    return max(inner + [1 + height(root, part, seen) for part in needed])


def merge(one: Mapping[str, Any], other: Any) -> dict[str, Any]:
    """Join two schemas that both must hold.

    Args:
        one: A schema.
        other: Another; may be a boolean.

    Returns:
        One schema with the words of both.

    Raises:
        ApiError: Both say different things with the same word, and the walker cannot join them.
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
    shared = {k: merge(_schema(one[k]), other[k]) for k in one.keys() & other.keys()}
    return {**one, **other, **shared}


def _join_parts(one: Any, other: Any) -> Any:
    return False if one is False or other is False else merge(_schema(one), other)


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
