"""Aggregators by group: an aggregator's result for each value of a field."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, TypeAlias

from ...backends.core.fields import FieldPath
from ...backends.core.types import Json, Outcome
from .base import Aggregator, State, to_countable

MAX_GROUPS: Final = 1_000
"""Maximum number of groups."""

NAME_CHARACTERS: Final = 200
"""Longer texts are cut, and are the same group if they begin alike."""

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

    Beyond the limit, the groups that come first are kept (booleans, then numbers, then texts, each
    in rising order), and the items of the others are counted. A group that was dropped stays
    dropped, so the choice does not depend on the order. Null does not count towards the limit.

    Attributes:
        inner: The aggregator.
        group_by: Name of the field.
        max_groups: Maximum number of groups.
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

    def lift(self, outcomes: Sequence[Outcome]) -> State:
        """Return the state of a batch of outcomes."""
        path, members = FieldPath.parse(self.group_by), dict[str, list[Outcome]]()
        for outcome in outcomes:
            for name, part in _split(path, outcome):
                members.setdefault(name, []).append(part)
        kept = _first_groups(members, self.max_groups)
        return {
            "of": self.to_spec(),
            "groups": {name: [len(members[name]), self._lift(members[name])] for name in kept},
            "others": sum(len(found) for name, found in members.items() if name not in kept),
        }

    def _lift(self, outcomes: Sequence[Outcome]) -> State:
        return _without_spec(self.inner.lift(outcomes))

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
        kept, others = _first_groups(groups, of["max_groups"]), a["others"] + b["others"]
        if len(kept) < len(groups):
            others += sum(size for name, (size, _) in groups.items() if name not in kept)
            groups = {name: groups[name] for name in kept}
        return {"of": of, "groups": groups, "others": others}

    def present(self, state: State) -> dict[str, Json]:
        """Return the result of each group: numbers in rising order, else the largest first."""
        empty = self.inner.empty()
        results = {name: (0, empty) for name in map(_to_name, self.categories) if name != _NULL}
        results |= {
            name: (size, {"of": empty["of"], **part})
            for name, (size, part) in state["groups"].items()
        }
        shown = self.inner.present(empty)
        groups = [
            {"group": json.loads(name), "size": size}
            | {k: v for k, v in self.inner.present(part).items() if k not in _HEAD}
            for name, (size, part) in sorted(results.items(), key=_order(results))
        ]
        head = {key: shown[key] for key in _HEAD if key in shown}
        return head | {"group_by": self.group_by, "groups": groups, "others": state["others"]}

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
        return json.dumps(value)
    return json.dumps(to_countable(value, NAME_CHARACTERS))


def _first_groups(groups: Mapping[str, object], most: int) -> Collection[str]:
    """Return the names of the groups within the limit; null is beside it."""
    if len(groups) - (_NULL in groups) <= most:
        return groups.keys()
    return set(sorted(groups, key=_rank)[: most + (_NULL in groups)])


def _rank(name: str) -> tuple[int, Json]:
    value = json.loads(name)
    if value is None:
        return 0, 0
    if isinstance(value, bool):
        return 1, value
    return (3, value) if isinstance(value, str) else (2, value)


def _order(results: Mapping[str, object]) -> Callable[[tuple[str, tuple[int, State]]], Json]:
    """Return the sort key of groups as they are shown, null last."""
    kinds = {_rank(name)[0] for name in results}
    if kinds <= {0, 2}:
        return lambda entry: (entry[0] == _NULL, _rank(entry[0]))
    return lambda entry: (entry[0] == _NULL, -entry[1][0], _rank(entry[0]))


def _without_spec(state: State) -> State:
    return {key: value for key, value in state.items() if key != "of"}
