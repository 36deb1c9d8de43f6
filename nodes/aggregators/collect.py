"""Stage ``collect``: the answers of the first items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from operator import attrgetter, itemgetter
from typing import ClassVar

from ...backends.core.types import Json, Outcome
from .base import Parameters, State, done
from .values import carried, path_of, pick


@dataclass(frozen=True, slots=True)
class Collect(Parameters):
    """Outputs of the first done items in input order.

    Attributes:
        limit: How many items.
        field: Dotted path to collect, or None for the whole output.
    """

    op: ClassVar[str] = "collect"
    limit: int = 100
    field: str | None = None

    def __post_init__(self) -> None:
        """Refuse a limit below 1."""
        if self.limit < 1:
            raise self.fault("limit", "at least 1")

    def empty(self) -> State:
        """Return the state of no outcomes."""
        return self.lift(())

    def lift(self, outcomes: Sequence[Outcome]) -> State:
        """Return the state of a batch of outcomes."""
        path = () if self.field is None else path_of(self.field)
        first = nsmallest(self.limit, done(outcomes), key=attrgetter("index"))
        rows = [[o.index, carried(o.id), carried(pick(o.output, path))] for o in first]
        return {"of": self.of(), "rows": rows}

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
