"""Aggregator ``agreement``: how far the samples of a row agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from ...backends.core.types import Json, Outcome
from .base import Aggregator, State, sanitize_json, sum_counts

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
        return self.lift(())

    def lift(self, outcomes: Sequence[Outcome]) -> State:
        """Return the state of a batch of outcomes."""
        folded = [outcome.folded for outcome in outcomes if outcome.folded is not None]
        found: dict[str, dict[str, int]] = {}
        for vote in (vote for one in folded for vote in one.votes):
            counts = {
                "votes": vote.votes,
                "answers": vote.answers,
                "unanimous": int(vote.votes == vote.answers),
                "ties": int(vote.is_tie),
            }
            name = str(sanitize_json(vote.field))
            found[name] = sum_counts(found.get(name, {}), counts)
        return _state(
            self.to_spec(),
            {
                "rows": len(folded),
                "samples": sum(one.samples for one in folded),
                "answers": sum(one.answers for one in folded),
                "partial": sum(0 < one.answers < one.samples for one in folded),
                "without_answer": sum(not one.answers for one in folded),
            },
            found,
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
        fields: dict[str, dict[str, int]] = state["fields"]
        return {
            "op": self.op,
            **state["counts"],
            "agreement": {name: one["votes"] / one["answers"] for name, one in fields.items()},
            "unanimous": {name: one["unanimous"] for name, one in fields.items()},
            "ties": {name: one["ties"] for name, one in fields.items()},
        }


def _state(of: Json, counts: Mapping[str, int], fields: Mapping[str, Mapping[str, int]]) -> State:
    kept = {name: dict(fields[name]) for name in sorted(fields)[:MOST_FIELDS]}
    return {"of": of, "counts": dict(counts), "fields": kept}
