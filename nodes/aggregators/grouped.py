"""Aggregators by group: an aggregator's result for each value of a field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from json.encoder import encode_basestring_ascii
from typing import ClassVar, Final, TypeAlias

from ...backends.core.fields import FieldPath
from ...backends.core.types import Json, Outcome
from .base import Aggregator, State, parse_field, to_countable

MAX_GROUPS: Final = 1_000
"""Maximum number of groups in a result."""

FOLLOWED_GROUPS: Final = 5_000
"""Groups that a state has, of which the result shows the largest."""

_FOLLOWED_ROWS: Final = 100_000
"""Rows of all groups of a state together; with many rows each, it has fewer groups."""

NAME_CHARACTERS: Final = 200
"""Longer texts are cut, and are the same group if they begin alike."""

_OVERSHOOT: Final = 2
"""By what factor the groups of a state may exceed the limit before they are ranked."""

_NULL: Final = "null"
_HEAD: Final = ("op", "field", "order", "note")
"""Keys of a result that all groups have in common."""

Combine: TypeAlias = Callable[[State, State], State]


@dataclass(frozen=True, slots=True)
class Grouped(Aggregator):
    """Another aggregator, applied to each group of items.

    A group has the items with the same value of a field; items without a text, number or boolean
    are the group null. With a field in the elements of a list, an item belongs to the group of
    each element, and there has only the elements of this group.

    A result shows the largest groups, and counts the items of the others. Only when all parts are
    combined is it known which ones are the largest, so a state has more groups than it shows:
    those that come first (booleans, then numbers, then texts, each in rising order), up to a limit.
    A group that was dropped stays dropped, so the choice does not depend on the order of the items.
    Null counts towards neither limit.

    Attributes:
        inner: The aggregator.
        group_by: Name of the field.
        max_groups: Maximum number of groups in the result.
        categories: Groups to show even if no item belongs to them.
    """

    op: ClassVar[str] = "group"
    inner: Aggregator
    group_by: str
    max_groups: int = 100
    categories: tuple[Json, ...] = ()

    def __post_init__(self) -> None:
        """Reject a limit out of range."""
        if not 1 <= self.max_groups <= MAX_GROUPS:
            raise self.parameter_error("max_groups", f"from 1 to {MAX_GROUPS:,}")

    def empty(self) -> State:
        """Return the state of no outcomes."""
        return {"of": self.to_spec(), "groups": {}, "others": 0}

    def add(self, state: State, outcomes: Sequence[Outcome]) -> None:
        """Add a batch of outcomes to a state, which may then exceed the limit up to twice."""
        path, members = parse_field(self.group_by), dict[str, list[Outcome]]()
        for outcome in outcomes:
            for name, part in _split(path, outcome):
                members.setdefault(name, []).append(part)
        groups = state["groups"]
        for name, found in members.items():
            group = groups.get(name)
            if group is None:
                group = groups[name] = [0, _without_spec(self.inner.empty())]
            group[0] += len(found)
            self.inner.add(group[1], found)
        # ranking all groups for each new one would make the cost grow with their number
        most = _followed_groups(state.get("of") or self.to_spec())
        if len(groups) > _OVERSHOOT * most + 1:
            state["groups"], others = _drop_groups(groups, most, _rank)
            state["others"] += others

    @staticmethod
    def combine_with(combine: Combine, a: State, b: State) -> State:
        """Return the state of the outcomes of both.

        Args:
            combine: Combines two states of the aggregator that is applied to each group.
            a: A state.
            b: Another.
        """
        of, groups = a["of"], dict(a["groups"])
        for name, (size, part) in b["groups"].items():
            if name in groups:
                known_size, known = groups[name]
                whole = combine({"of": of, **known}, {"of": of, **part})
                groups[name] = [known_size + size, _without_spec(whole)]
            else:
                groups[name] = [size, part]
        groups, others = _drop_groups(groups, _followed_groups(of), _rank)
        return {"of": of, "groups": groups, "others": a["others"] + b["others"] + others}

    def present(self, state: State) -> dict[str, Json]:
        """Return the result of each group: numbers in rising order, else the largest first."""
        empty, followed = self.inner.empty(), _followed_groups(self.to_spec())
        groups, unknown = _drop_groups(state["groups"], followed, _rank)
        unknown += state["others"]
        kept, others = _drop_groups(groups, self.max_groups, _largest_first(groups))
        results = {name: (0, empty) for name in map(_to_name, self.categories) if name != _NULL}
        results |= {
            name: (size, {"of": empty["of"], **part}) for name, (size, part) in kept.items()
        }
        shown = self.inner.present(empty)
        rows = [
            {"group": json.loads(name), "size": size}
            | {k: v for k, v in self.inner.present(part).items() if k not in _HEAD}
            for name, (size, part) in sorted(results.items(), key=_order(results))
        ]
        head = {key: shown[key] for key in _HEAD if key in shown}
        return head | {
            "group_by": self.group_by,
            "groups": rows,
            "others": others + unknown,
            "other_groups": None if unknown else len(groups) - len(kept),
        }

    def to_spec(self) -> dict[str, Json]:
        """Return the parameters of the aggregator, and those of the groups."""
        return self.inner.to_spec() | {"group_by": self.group_by, "max_groups": self.max_groups}


def _split(path: FieldPath, outcome: Outcome) -> Iterable[tuple[str, Outcome]]:
    """Return the groups of an outcome, and the part of it that belongs to each."""
    if not path.is_many:
        return ((_to_name(path.pick_one(outcome.output, outcome.row)), outcome),)
    parts = path.split(outcome.output, outcome.row, _to_name)
    if not parts:
        return ((_NULL, outcome),)
    return [(name, replace(outcome, output=o, row=row)) for name, (o, row) in parts.items()]


def _to_name(value: Json) -> str:
    """Return the key of a group."""
    if value.__class__ is str and value.isascii() and len(value) <= NAME_CHARACTERS:
        return encode_basestring_ascii(value)
    return json.dumps(to_countable(value, NAME_CHARACTERS))


def _followed_groups(of: Mapping[str, Json]) -> int:
    """Return how many groups a state has at most, null beside them."""
    rows, shown = int(of.get("k") or of.get("limit") or 1), int(of["max_groups"])
    return max(shown, min(FOLLOWED_GROUPS, _FOLLOWED_ROWS // rows))


def _drop_groups(
    groups: dict[str, Json], most: int, key: Callable[[str], Json]
) -> tuple[dict[str, Json], int]:
    """Return the first groups by a key, null beside them, and the number of items in the others."""
    most += _NULL in groups
    if len(groups) <= most:
        return groups, 0
    kept = {name: groups[name] for name in sorted(groups, key=key)[:most]}
    return kept, sum(size for name, (size, _) in groups.items() if name not in kept)


def _rank(name: str) -> tuple[int, Json]:
    value = json.loads(name)
    if value is None:
        return 0, 0
    if isinstance(value, bool):
        return 1, value
    return (3, value) if isinstance(value, str) else (2, value)


def _largest_first(groups: Mapping[str, Json]) -> Callable[[str], Json]:
    """Return the sort key of the groups by size, null first; of equal ones the first one."""
    return lambda name: (name != _NULL, -groups[name][0], _rank(name))


def _order(results: Mapping[str, object]) -> Callable[[tuple[str, tuple[int, State]]], Json]:
    """Return the sort key of groups as they are shown, null last."""
    kinds = {_rank(name)[0] for name in results}
    if kinds <= {0, 2}:
        return lambda entry: (entry[0] == _NULL, _rank(entry[0]))
    return lambda entry: (entry[0] == _NULL, -entry[1][0], _rank(entry[0]))


def _without_spec(state: State) -> State:
    return {key: value for key, value in state.items() if key != "of"}
