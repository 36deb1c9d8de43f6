"""A part of a document (``input.split``), and its pieces if it is too long for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ...backends.core.samples import SampleFold, concat_answers, make_rule
from ...backends.core.text_tokens import halve_text
from ...backends.core.types import PART_COLUMN, PART_FIELDS, Json, Row

_LEAST: Final = 2
"""Samples of a fold, which its result only counts."""


def is_part(row: Row) -> bool:
    """Return True if ``input.split`` made the row."""
    found = row.get(PART_COLUMN)
    return isinstance(found, dict) and all(
        isinstance(found.get(name), kind) for name, kind in PART_FIELDS.items()
    )


@dataclass(frozen=True, slots=True)
class PartSplit:
    """How a part that is too long for the model is asked in pieces.

    Attributes:
        column: Column with the text.
        overlap: Tokens of the end of a piece that the next one repeats, at most.
        schema: JSON Schema of the answers; None for free text.
    """

    column: str
    overlap: int
    schema: Mapping[str, Any] | None

    def cut(self, row: Row) -> list[Row]:
        """Return rows with the halves of a part's text, each with its place in the document.

        Args:
            row: A row; one that is no part, or has a short text, has no pieces.
        """
        text = row.get(self.column)
        if not isinstance(text, str) or not is_part(row):
            return []
        about = row[PART_COLUMN]
        return [
            {
                **row,
                self.column: text[lo:hi],
                PART_COLUMN: {**about, "start": about["start"] + lo, "end": about["start"] + hi},
            }
            for lo, hi in halve_text(text, self.overlap)
        ]

    def join(self, answers: Sequence[Json], places: Sequence[Mapping[str, int]]) -> Json:
        """Return the answers about the pieces of a part as one.

        Lists and texts follow each other, numbers are averaged and all else votes. Where votes are
        equal, the longest piece with a value decides, because the answer must fit the schema.

        Args:
            answers: The answers, in the order of the text.
            places: Start and end of each piece.
        """
        folded = SampleFold(_LEAST, make_rule(None, self.schema)).fold(answers).output
        lengths = [place["end"] - place["start"] for place in places]
        order = sorted(range(len(places)), key=lengths.__getitem__, reverse=True)
        decided = _decide(folded, [answers[at] for at in order])
        schema = {"type": "string"} if self.schema is None else self.schema
        return concat_answers(decided, answers, schema, schema)


def _decide(folded: Json, answers: Sequence[Json]) -> Json:
    """Return a folded answer with the first known value where the fold has none.

    Args:
        folded: The folded answer.
        answers: The answers, that about the longest piece first.
    """
    known = [one for one in answers if one is not None]
    if known and all(isinstance(one, dict) for one in known):
        below = folded if isinstance(folded, dict) else {}
        keys = dict.fromkeys(key for one in known for key in one)
        return {key: _decide(below.get(key), [one.get(key) for one in known]) for key in keys}
    return known[0] if folded is None and known else folded
