"""Aggregators ``top_k``, ``collect`` and ``count``."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nsmallest
from math import inf
from operator import attrgetter, itemgetter
from typing import ClassVar, Final, Literal

from ...backends.core.fields import FieldPath
from ...backends.core.types import Json, Outcome
from .base import (
    SHOWN_CHARACTERS,
    Aggregator,
    State,
    add_counts,
    done_outcomes,
    finite_number,
    no_missing,
    parse_field,
    pick_values,
    sanitize_json,
    show_missing,
    sum_counts,
    sum_missing,
)


@dataclass(frozen=True, slots=True)
class TopK(Aggregator):
    """The k items that rank first by a number in the output; ties go to the earlier item.

    Attributes:
        field: Name of the field. A value that is not a finite number counts as missing. In the
            elements of a list each value is ranked, and an item may have several ranks.
        k: How many items, or values.
        order: Whether the ``largest`` or the ``smallest`` ranks first.
        show: Columns of the input, or fields inside them, to carry along; texts over 2,000
            characters are cut.
    """

    op: ClassVar[str] = "top_k"
    field: str
    k: int = 10
    order: Literal["largest", "smallest"] = "largest"
    show: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Reject a k below 1 and an unknown order."""
        if self.k < 1:
            raise self.parameter_error("k", "at least 1")
        if self.order not in {"largest", "smallest"}:
            raise self.parameter_error("order", "largest or smallest")

    def empty(self) -> State:
        """Return the state of no outcomes."""
        return {"of": self.to_spec(), **no_missing(self.field), "rows": []}

    def add(self, state: State, outcomes: Sequence[Outcome]) -> None:
        """Add a batch of outcomes to a state."""
        found = done_outcomes(outcomes)
        path = parse_field(self.field)
        if path.is_many:
            self._add_elements(state, path, found)
            return
        keyed = [
            (value, outcome)
            for outcome, picked in zip(found, pick_values(self.field, found), strict=True)
            if (value := finite_number(picked)) is not None
        ]
        state["missing"] += len(found) - len(keyed)
        sign = _sign(self.order)
        first = nsmallest(self.k, keyed, key=lambda one: (sign * one[0], one[1].index))
        self._add_rows(state, (self._row(*one) for one in first))

    def _add_elements(self, state: State, path: FieldPath, found: Sequence[Outcome]) -> None:
        """Add outcomes with several values; a row also has the value's place."""
        sign, items = _sign(self.order), set[int]()
        keyed = list[tuple[float, int, Outcome]]()
        for outcome in found:
            for at, picked in enumerate(path.pick_all(outcome.output, outcome.row)):
                if (value := finite_number(picked)) is not None:
                    keyed.append((value, at, outcome))
                    items.add(outcome.index)
        add_counts(state, {"missing": len(found) - len(items), "items": len(items)})
        first = nsmallest(self.k, keyed, key=lambda one: (sign * one[0], one[2].index, one[1]))
        self._add_rows(state, ([*self._row(value, outcome), at] for value, at, outcome in first))

    def _add_rows(self, state: State, rows: Iterable[list[Json]]) -> None:
        """Add rows in order of rank, as far as they are among the first k."""
        known, rank = state["rows"], partial(_rank, _sign(self.order))
        for row in rows:
            if len(known) == self.k and rank(known[-1]) < rank(row):
                return
            insort(known, row, key=rank)
            del known[self.k :]

    def _row(self, value: float, outcome: Outcome) -> list[Json]:
        shown = [
            sanitize_json(
                FieldPath("input", tuple(name.split("."))).pick(None, outcome.row), SHOWN_CHARACTERS
            )
            for name in self.show
        ]
        return [
            value,
            outcome.index,
            sanitize_json(outcome.id),
            sanitize_json(outcome.output),
            shown,
        ]

    @staticmethod
    def combine(a: State, b: State) -> State:
        """Return the state of the outcomes of both."""
        of = a["of"]
        rows = sorted([*a["rows"], *b["rows"]], key=partial(_rank, _sign(of["order"])))
        return {"of": of, **sum_missing(a, b), "rows": rows[: of["k"]]}

    def present(self, state: State) -> dict[str, Json]:
        """Return the rows in order of rank, from 1."""
        rows = [
            {
                "rank": rank,
                "id": name,
                "value": value,
                "output": output,
                "show": dict(zip(self.show, shown, strict=True)),
            }
            for rank, (value, _, name, output, shown, *_) in enumerate(state["rows"], start=1)
        ]
        head = {"op": self.op, "field": self.field, "order": self.order}
        return head | {"rows": rows} | show_missing(state)


def _sign(order: str) -> int:
    return -1 if order == "largest" else 1


def _rank(sign: int, row: list[Json]) -> tuple[Json, ...]:
    # an item with several values has their place at the end of its rows
    return sign * row[0], row[1], row[5:]


@dataclass(frozen=True, slots=True)
class Collect(Aggregator):
    """Outputs of the first done items in input order.

    Attributes:
        limit: How many items.
        field: Name of the field to collect, or None for the whole output. A field in the elements
            of a list gives a list of values.
    """

    op: ClassVar[str] = "collect"
    limit: int = 100
    field: str | None = None

    def __post_init__(self) -> None:
        """Reject a limit below 1."""
        if self.limit < 1:
            raise self.parameter_error("limit", "at least 1")

    def empty(self) -> State:
        """Return the state of no outcomes."""
        return {"of": self.to_spec(), "rows": []}

    def add(self, state: State, outcomes: Sequence[Outcome]) -> None:
        """Add a batch of outcomes to a state."""
        known = state["rows"]
        last = known[-1][0] if len(known) == self.limit else inf
        before = [one for one in done_outcomes(outcomes) if one.index < last]
        first = nsmallest(self.limit, before, key=attrgetter("index"))
        values = pick_values("output" if self.field is None else self.field, first)
        for outcome, value in zip(first, values, strict=True):
            row = [outcome.index, sanitize_json(outcome.id), sanitize_json(value)]
            insort(known, row, key=itemgetter(0))
        del known[self.limit :]

    @staticmethod
    def combine(a: State, b: State) -> State:
        """Return the state of the outcomes of both."""
        rows = sorted([*a["rows"], *b["rows"]], key=itemgetter(0))
        return {"of": a["of"], "rows": rows[: a["of"]["limit"]]}

    def present(self, state: State) -> dict[str, Json]:
        """Return the rows in input order: ``id`` and ``output``, or ``value`` of a field."""
        name = "output" if self.field is None else "value"
        rows = [{"id": item, name: value} for _, item, value in state["rows"]]
        return {"op": self.op, "field": self.field, "rows": rows}


MAX_CLASSES: Final = 100
"""Maximum number of error classes that are counted separately."""


@dataclass(frozen=True, slots=True)
class Count(Aggregator):
    """Counts of items, failed ones by error class.

    Beyond 100 classes the alphabetically first 100 are kept and the rest are counted together. A
    class that was dropped stays dropped, so the choice does not depend on the order.
    """

    op: ClassVar[str] = "count"

    def empty(self) -> State:
        """Return the state of no outcomes."""
        return _state(self.to_spec(), 0, {}, 0)

    def add(self, state: State, outcomes: Sequence[Outcome]) -> None:
        """Add a batch of outcomes to a state."""
        failed = [one.error_class or "unknown" for one in outcomes if one.status == "failed"]
        state["done"] += len(outcomes) - len(failed)
        if failed:
            add_counts(state["classes"], Counter(failed))
            state["classes"], others = _first_classes(state["classes"])
            state["others"] += others

    @staticmethod
    def combine(a: State, b: State) -> State:
        """Return the state of the outcomes of both."""
        classes = sum_counts(a["classes"], b["classes"])
        return _state(a["of"], a["done"] + b["done"], classes, a["others"] + b["others"])

    def present(self, state: State) -> dict[str, Json]:
        """Return ``done_outcomes``, ``failed``, and failures by class, the most frequent first."""
        classes: dict[str, int] = state["classes"]
        ranked = sorted(classes.items(), key=lambda pair: (-pair[1], pair[0]))
        if state["others"]:
            ranked.append(("other classes", state["others"]))
        failed = sum(count for _, count in ranked)
        return {
            "op": self.op,
            "done": state["done"],
            "failed": failed,
            "failed_by_class": dict(ranked),
        }


def _state(of: Json, done: int, classes: Mapping[str, int], others: int) -> State:
    kept, dropped = _first_classes(classes)
    return {"of": of, "done": done, "classes": kept, "others": others + dropped}


def _first_classes(classes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Return the classes that are kept, and the failures of the others."""
    names = sorted(classes)
    kept = {name: classes[name] for name in names[:MAX_CLASSES]}
    return kept, sum(classes[name] for name in names[MAX_CLASSES:])
