"""Aggregator ``agreement``: how far the samples of a row agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from ...backends.core.types import Json, Outcome
from .base import Aggregator, State, add_counts, sanitize_json, sum_counts

MOST_FIELDS: Final = 100
"""Fields that are counted; answers without a schema may have any number of them."""


@dataclass(frozen=True, slots=True)
class Agreement(Aggregator):
    """Votes of the samples, by field, and rows whose samples have failed.

    Beyond 100 fields the alphabetically first 100 are kept: the choice does not depend on the
    order of the outcomes.
    """

    op: ClassVar[str] = "agreement"

    def empty(self) -> State:
        """Return the state of no outcomes."""
        names = ("rows", "samples", "answers", "partial", "without_answer")
        return _state(self.to_spec(), dict.fromkeys(names, 0), {})

    def add(self, state: State, outcomes: Sequence[Outcome]) -> None:
        """Add a batch of outcomes to a state."""
        folded = [outcome.folded for outcome in outcomes if outcome.folded is not None]
        found: dict[str, dict[str, int]] = state["fields"]
        for vote in (vote for one in folded for vote in one.votes):
            counts = {
                "votes": vote.votes,
                "answers": vote.answers,
                "unanimous": int(vote.votes == vote.answers),
                "ties": int(vote.is_tie),
            }
            add_counts(found.setdefault(str(sanitize_json(vote.field)), {}), counts)
        state["fields"] = _first_fields(found)
        add_counts(
            state["counts"],
            {
                "rows": len(folded),
                "samples": sum(one.samples for one in folded),
                "answers": sum(one.answers for one in folded),
                "partial": sum(0 < one.answers < one.samples for one in folded),
                "without_answer": sum(not one.answers for one in folded),
            },
        )

    @staticmethod
    def combine(a: State, b: State) -> State:
        """Return the state of the outcomes of both."""
        fields = {
            name: sum_counts(a["fields"].get(name, {}), b["fields"].get(name, {}))
            for name in a["fields"].keys() | b["fields"].keys()
        }
        return _state(a["of"], sum_counts(a["counts"], b["counts"]), fields)

    def present(self, state: State) -> dict[str, Json]:
        """Return the counts, and by field: agreement, unanimous rows, and ties."""
        fields: dict[str, dict[str, int]] = dict(sorted(state["fields"].items()))
        return {
            "op": self.op,
            **state["counts"],
            "agreement": {name: one["votes"] / one["answers"] for name, one in fields.items()},
            "unanimous": {name: one["unanimous"] for name, one in fields.items()},
            "ties": {name: one["ties"] for name, one in fields.items()},
        }


def _state(of: Json, counts: dict[str, int], fields: dict[str, dict[str, int]]) -> State:
    return {"of": of, "counts": counts, "fields": _first_fields(fields)}


def _first_fields(fields: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    if len(fields) <= MOST_FIELDS:
        return fields
    return {name: fields[name] for name in sorted(fields)[:MOST_FIELDS]}
