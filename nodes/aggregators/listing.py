"""Stage ``top_k``: the items with the largest or smallest number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from operator import itemgetter
from typing import ClassVar, Literal

from ...backends.core.types import Json, Outcome
from .base import Parameters, State, done
from .values import SHOWN_CHARACTERS, carried, number, path_of, pick


@dataclass(frozen=True, slots=True)
class TopK(Parameters):
    """The k items that rank first by a number in the output; ties go to the earlier item.

    Attributes:
        field: Dotted path into the output. What is no finite number there counts as missing.
        k: How many items.
        order: Whether the ``largest`` or the ``smallest`` ranks first.
        show: Columns of the input to carry along; texts over 2,000 characters are cut.
    """

    op: ClassVar[str] = "top_k"
    field: str
    k: int = 10
    order: Literal["largest", "smallest"] = "largest"
    show: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a k below 1 and an unknown order."""
        if self.k < 1:
            raise self.fault("k", "at least 1")
        if self.order not in {"largest", "smallest"}:
            raise self.fault("order", "largest or smallest")

    def empty(self) -> State:
        """Return the state of no outcomes."""
        return self.lift(())

    def lift(self, outcomes: Sequence[Outcome]) -> State:
        """Return the state of a batch of outcomes."""
        path, sign = path_of(self.field), _sign(self.order)
        found = done(outcomes)
        keyed = [
            (sign * value, outcome.index, value, outcome)
            for outcome in found
            if (value := number(pick(outcome.output, path))) is not None
        ]
        first = nsmallest(self.k, keyed, key=itemgetter(0, 1))
        return {
            "of": self.of(),
            "missing": len(found) - len(keyed),
            "rows": [self._row(value, outcome) for _, _, value, outcome in first],
        }

    def _row(self, value: float, outcome: Outcome) -> list[Json]:
        shown = [carried(outcome.row.get(name), SHOWN_CHARACTERS) for name in self.show]
        return [value, outcome.index, carried(outcome.id), carried(outcome.output), shown]

    @staticmethod
    def combine(a: State, b: State) -> State:
        """Return the state of the outcomes of both."""
        of = a["of"]
        sign = _sign(of["order"])
        rows = sorted([*a["rows"], *b["rows"]], key=lambda row: (sign * row[0], row[1]))
        return {"of": of, "missing": a["missing"] + b["missing"], "rows": rows[: of["k"]]}

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
            for rank, (value, _, name, output, shown) in enumerate(state["rows"], start=1)
        ]
        head = {"op": self.op, "field": self.field, "order": self.order}
        return head | {"rows": rows, "missing": state["missing"]}


def _sign(order: str) -> int:
    return -1 if order == "largest" else 1
