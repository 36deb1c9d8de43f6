"""Fold the answers to several samples of a row into one: votes and means, by field."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final, Literal, Self, TypeAlias

import orjson

from .errors import ConfigurationError
from .fields import find_keywords, find_properties, follow_references
from .types import FieldVote, FoldedAnswer, Json

FoldKind: TypeAlias = Literal["vote", "mean"]
FoldSetting: TypeAlias = FoldKind | Mapping[str, FoldKind] | None
"""One rule for all fields, or rules by dotted name; None chooses by the type of each field."""

WHOLE: Final = "output"
"""Name of the whole answer, as of a field."""

_DEEPEST: Final = 8
"""Levels of objects below which an answer is folded as a whole."""
_NUMBERS: Final = {"integer", "number"}


@dataclass(frozen=True, slots=True)
class FoldRule:
    """How the values of one field are folded.

    Attributes:
        kind: ``vote``, ``mean``, or ``fields``: an object whose fields have rules of their own.
        fields: The rules of an object's fields, by name; other fields vote.
    """

    kind: Literal["vote", "mean", "fields"]
    fields: Mapping[str, FoldRule] = field(default_factory=dict)

    def walk(self, name: str = "") -> Iterator[tuple[str, FoldRule]]:
        """Yield the rules of all fields that are no objects, with their dotted names."""
        if self.kind != "fields":
            yield name or WHOLE, self
        for key, rule in self.fields.items():
            yield from rule.walk(f"{name}.{key}" if name else key)


@dataclass(frozen=True, slots=True)
class SampleFold:
    """The fold of a task: how many samples, and the rule for their answers.

    Attributes:
        samples: Samples of each row; at least 2.
        rule: How their answers are folded.
    """

    samples: int
    rule: FoldRule

    @classmethod
    def from_task(cls, task: Mapping[str, Any]) -> Self | None:
        """Return the fold of the section ``task``, as plain data; None without samples.

        Raises:
            ConfigurationError: ``task.fold`` does not fit the schema.
        """
        rule = make_rule(task.get("fold"), task.get("schema"))
        samples = task.get("samples") or 1
        return cls(samples, rule) if samples > 1 else None

    def fold(self, outputs: Sequence[Json]) -> FoldedAnswer:
        """Return the answers of a row as one.

        Args:
            outputs: Answers of the samples that have one, in order.
        """
        if not outputs:
            return FoldedAnswer(self.samples, 0, None, None, None, ())
        folded = _fold(self.rule, outputs, "")
        return FoldedAnswer(
            self.samples,
            len(outputs),
            folded.value,
            folded.agreement,
            folded.spread,
            tuple(folded.votes),
        )

    def fold_schema(self, schema: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return the schema of folded answers: a mean of integers is a number."""
        if schema is None:
            return None
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        return shared | dict(_fold_schema(self.rule, schema, schema))


def make_rule(setting: FoldSetting, schema: Mapping[str, Any] | None) -> FoldRule:
    """Return the rule that a setting and the schema of the answers give.

    Numbers (``type: number``) are averaged and all else votes, unless the setting says otherwise.

    Raises:
        ConfigurationError: It averages what is no number, or names no field.
    """
    given = dict(setting) if isinstance(setting, Mapping) else {}
    every = None if isinstance(setting, Mapping) else setting
    root = schema or {"type": "string"}
    rule = _RuleMaker(root, every, given).make(root, "", frozenset())
    names = dict(rule.walk())
    if given:
        listed = ", ".join(names)
        close = get_close_matches(next(iter(given)), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        msg = (
            f"task.fold names {next(iter(given))!r}, which is not a field of the answer ({listed})"
        )
        raise ConfigurationError(msg + hint)
    if every == "mean" and not any(one.kind == "mean" for one in names.values()):
        needs = "task.schema" if schema is None else "a number in task.schema"
        raise ConfigurationError(f"task.fold: mean needs {needs}; use vote, or leave it out")
    return rule


@dataclass(frozen=True, slots=True)
class _RuleMaker:
    """Makes the rules of a schema.

    Attributes:
        root: The whole schema, for references.
        every: The rule for all fields that may have it, or None.
        given: Rules by dotted name; those that are used are taken out.
    """

    root: Mapping[str, Any]
    every: FoldKind | None
    given: dict[str, FoldKind]

    def make(self, schema: Any, name: str, seen: frozenset[int]) -> FoldRule:
        found = follow_references(schema, self.root)
        named = self.given.pop(name or WHOLE, None)
        types = _read_types(found, self.root)
        is_number = bool(types - {"null"}) and types <= _NUMBERS | {"null"}
        if named == "mean" and not is_number:
            kinds = "/".join(sorted(types)) or "of any type"
            msg = f"task.fold.{name or WHOLE}: mean needs a number, and the field is {kinds}"
            raise ConfigurationError(msg)
        properties = find_properties(found, self.root)
        if named is None and properties and len(seen) < _DEEPEST and id(found) not in seen:
            below = seen | {id(found)}
            prefix = f"{name}." if name else ""
            parts = {k: self.make(sub, prefix + k, below) for k, sub in properties.items()}
            return FoldRule("fields", parts)
        if named is None and self.every is None:
            named = "mean" if is_number and "number" in types and "enum" not in found else "vote"
        return FoldRule(named or ("mean" if self.every == "mean" and is_number else "vote"))


_CLOSED: Final = {"enum", "const", "pattern", "format", "maxLength"}
"""Keywords by which a text has few values."""


def list_free_texts(setting: FoldSetting, schema: Mapping[str, Any] | None) -> list[str]:
    """Return the dotted names of the fields that vote and are texts of any content.

    Raises:
        ConfigurationError: The setting does not fit the schema.
    """
    if schema is None:
        return []
    names, open_rules = list[str](), [("", make_rule(setting, schema), schema)]
    while open_rules:
        name, rule, found = open_rules.pop(0)
        found = dict(follow_references(found, schema))
        if rule.kind == "fields":
            properties, prefix = find_properties(found, schema), f"{name}." if name else ""
            open_rules += [(prefix + k, one, properties[k]) for k, one in rule.fields.items()]
        elif "string" in _read_types(found, schema) and _CLOSED.isdisjoint(
            find_keywords(found, schema)
        ):
            names.append(name or WHOLE)
    return names


def _read_types(schema: Mapping[str, Any], root: Mapping[str, Any]) -> set[str]:
    """Return the types that a schema allows, as far as it says."""
    declared = schema.get("type")
    if declared is not None:
        return {declared} if isinstance(declared, str) else set(declared)
    for union in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(union), list):
            parts = [_read_types(follow_references(one, root), {}) for one in options]
            return set().union(*parts) if all(parts) else set()
    return set()


@dataclass(frozen=True, slots=True)
class _Folded:
    value: Json
    agreement: Json
    spread: Json
    votes: list[FieldVote]


def _fold(rule: FoldRule, values: Sequence[Json], name: str) -> _Folded:
    if rule.kind == "mean":
        return _average(values)
    objects = [value for value in values if isinstance(value, dict)]
    if rule.kind == "vote" or 2 * len(objects) <= len(values):
        return _vote(values, name or WHOLE)
    parts = {
        key: _fold(
            rule.fields.get(key, FoldRule("vote")),
            [one.get(key) for one in objects],
            f"{name}.{key}" if name else key,
        )
        for key in dict.fromkeys(key for one in objects for key in one)
    }
    return _Folded(
        {key: part.value for key, part in parts.items()},
        {key: part.agreement for key, part in parts.items() if part.agreement is not None} or None,
        {key: part.spread for key, part in parts.items() if part.spread is not None} or None,
        [vote for part in parts.values() for vote in part.votes],
    )


def _average(values: Sequence[Json]) -> _Folded:
    """Return the mean of the numbers among the values, and their sample standard deviation."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if not numbers:
        return _Folded(None, None, None, [])
    count = len(numbers)
    try:
        mean = math.fsum(numbers) / count
    except OverflowError:  # the sum exceeds all floats
        mean = math.fsum(number / count for number in numbers)
    spread = None
    if count > 1:
        spread = math.hypot(*(number - mean for number in numbers)) / math.sqrt(count - 1)
    return _Folded(mean, None, spread, [])


def _vote(values: Sequence[Json], name: str) -> _Folded:
    """Return the most frequent value, or None if there are several."""
    keys = [_make_key(value) for value in values]
    counts = Counter(keys)
    most = max(counts.values())
    leading = [key for key, count in counts.items() if count == most]
    is_tie = len(leading) > 1
    value = None if is_tie else values[keys.index(leading[0])]
    vote = FieldVote(name, most, len(values), is_tie)
    return _Folded(value, most / len(values), None, [vote])


def _make_key(value: Json) -> bytes:
    """Return equal bytes for equal values: 1.0 is 1, and outer blanks of texts do not count."""
    return orjson.dumps(_normalize(value), option=orjson.OPT_SORT_KEYS)


def _normalize(value: Json) -> Json:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and value.is_integer():
        return int(value) if abs(value) < _EXACT else value
    if isinstance(value, list):
        return [_normalize(one) for one in value]
    if isinstance(value, dict):
        return {key: _normalize(one) for key, one in value.items()}
    return value


_EXACT: Final = 2.0**53
"""Above it not every integer has a float of its own."""


def _fold_schema(rule: FoldRule, schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    found = follow_references(schema, root)
    if rule.kind == "mean" and "number" not in _read_types(found, root):
        return {"type": ["number", "null"]}
    if rule.kind != "fields" or not any(one.kind == "mean" for _, one in rule.walk()):
        return found
    properties = find_properties(found, root)
    parts = {key: _fold_schema(one, properties[key], root) for key, one in rule.fields.items()}
    kept = {key: value for key, value in found.items() if key not in ("anyOf", "oneOf", "allOf")}
    return kept | {"type": "object", "properties": parts}


def find_row_error(classes: Sequence[str | None]) -> str | None:
    """Return the most frequent error class of a row's samples; the first of several."""
    return Counter(classes).most_common(1)[0][0]


def concat_answers(
    folded: Json, answers: Sequence[Json], schema: Any, root: Mapping[str, Any]
) -> Json:
    """Return answers with their lists and texts one after the other, all else as folded.

    Of equal texts one is kept. Texts with an enum, a pattern or a format are no texts but values,
    and so are lists of a fixed length.

    Args:
        folded: The answers as one.
        answers: The answers, in order.
        schema: Their JSON Schema.
        root: The schema that its references are resolved in.
    """
    known = [one for one in answers if one is not None]
    if known and all(isinstance(one, dict) for one in known):
        properties = find_properties(schema, root)
        keys = dict.fromkeys(key for one in known for key in one)
        below = folded if isinstance(folded, dict) else {}
        return {
            key: concat_answers(
                below.get(key), [one.get(key) for one in known], properties.get(key), root
            )
            for key in keys
        }
    if not known or _is_value(find_keywords(schema, root)):
        return folded
    if all(isinstance(one, list) for one in known):
        return [element for one in known for element in one]
    if all(isinstance(one, str) for one in known):
        return "\n\n".join(dict.fromkeys(known))
    return folded


_VALUES: Final = {"enum", "const", "pattern", "format", "prefixItems"}
"""Keywords of answers that are whole: parts of them say nothing."""


def _is_value(keywords: Mapping[str, Any]) -> bool:
    """Return True if answers with these keywords of their schema are values, no lists or texts."""
    has_length = "maxItems" in keywords and keywords.get("minItems") == keywords["maxItems"]
    return has_length or not _VALUES.isdisjoint(keywords)
