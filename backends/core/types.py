"""Values that pass between folders, and between processes as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from typing_extensions import TypedDict

Json: TypeAlias = Any
"""Any JSON value: None, bool, int, float, str, list or dict of the same."""

Row: TypeAlias = dict[str, Json]
"""One input row: column name to value."""

Message: TypeAlias = dict[str, Any]
"""One chat message in OpenAI's form: ``{"role": ..., "content": ...}``."""

Status: TypeAlias = Literal["done", "failed"]

CHAT_URL: Final = "/v1/chat/completions"
"""The ``url`` of a chat request in OpenAI's batch format."""

SIMULATED_FINGERPRINT: Final = "fanfold-simulated"
"""``system_fingerprint`` of every simulated answer, and ``owned_by`` of every simulated model:
these two fields identify a simulated fleet, no matter how it was reached."""


@dataclass(slots=True)  # not frozen, which would take three times as long to make
class Item:
    """One row of the input.

    Attributes:
        index: Position in the input, from 0; results are in this order.
        id: The item's name, unique within the run.
        row: The columns.
        problem: Why the item must not be sent (an unparsable SMILES, say), or None.
        sample: Number of the item among those that ask the same of one row, from 0.
    """

    index: int
    id: str
    row: Row
    problem: str | None = None
    sample: int = 0

    @property
    def row_id(self) -> str:
        """Return the id of the row, which all samples of it share."""
        return find_row_id(self.id, self.sample)


def find_row_id(item_id: str, sample: int) -> str:
    """Return the id of the row of an item, by the item's id and the number of its sample."""
    return item_id.removesuffix(_sample_suffix(sample))


def make_sample_id(row_id: str, sample: int) -> str:
    """Return the id of a sample, from 0: the row's own for the first, then ``ROW~2`` and so on."""
    return row_id + _sample_suffix(sample)


def _sample_suffix(sample: int) -> str:
    return f"~{sample + 1}" if sample else ""


def make_part_id(document: str, number: int) -> str:
    """Return the id of a part of a document, by its number from 1."""
    return f"{document}/p{number}"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one or several calls; None means that the server did not report them.

    Attributes:
        prompt: Prompt tokens, cached ones included.
        completion: Completion tokens.
        cached: Prompt tokens from a prefix cache.
    """

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None

    @property
    def tokens(self) -> int:
        """Return prompt and completion tokens together, as far as known."""
        return (self.prompt or 0) + (self.completion or 0)

    def __add__(self, other: Usage) -> Usage:
        """Add known values; a sum is unknown only if both are."""
        return Usage(
            _sum(self.prompt, other.prompt),
            _sum(self.completion, other.completion),
            _sum(self.cached, other.cached),
        )


def _sum(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's answer to one request.

    Attributes:
        content: The text, ``""`` if the server sent none.
        finish_reason: ``stop``, ``length``, ``content_filter``, …, or None.
        refusal: The model's refusal, or None.
        usage: Tokens of the answering call.
        endpoint: Label of the endpoint that answered.
        model: The model's name as the server gave it.
        simulated: Whether a simulated fleet answered.
        cached: Whether it is the answer to an earlier request, at no cost.
        reasoning: The reasoning that the server sent apart from the text, or None.
        logprobs: The log probabilities of the tokens as the server sent them, or None.
    """

    content: str
    finish_reason: str | None
    refusal: str | None
    usage: Usage
    endpoint: str
    model: str
    simulated: bool
    cached: bool = False
    reasoning: str | None = None
    logprobs: Json = None


@dataclass(frozen=True, slots=True)
class FieldVote:
    """How the samples of a row agree in one field.

    Attributes:
        field: Dotted name of the field; ``output`` is the whole answer.
        votes: Answers with the most frequent value.
        answers: Number of answers.
        is_tie: Whether several values are the most frequent.
    """

    field: str
    votes: int
    answers: int
    is_tie: bool


@dataclass(frozen=True, slots=True)
class FoldedAnswer:
    """The answers to all samples of a row as one.

    Attributes:
        samples: Number of samples.
        answers: Number of them that have an answer.
        output: The folded answer; None if there is none.
        agreement: Share of the answers that have the most frequent value, by field as in the
            answer; None where there is no vote.
        spread: Standard deviation of the numbers that are averaged, by field.
        votes: The votes, by field.
    """

    samples: int
    answers: int
    output: Json
    agreement: Json
    spread: Json
    votes: tuple[FieldVote, ...]


@dataclass(slots=True)  # not frozen, which would take three times as long to make
class Outcome:
    """Result of one item, or of all samples of a row, as aggregators see it.

    Attributes:
        index: Position in the input.
        id: The item's name.
        status: ``done`` or ``failed``.
        output: The answer (None if failed).
        error_class: Name of the error's class if failed.
        row: The item's columns.
        folded: The answers of the samples, if the row has several.
    """

    index: int
    id: str
    status: Status
    output: Json
    error_class: str | None = None
    row: Row = field(default_factory=dict)
    folded: FoldedAnswer | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A range of items: positions ``lo`` to ``hi`` (exclusive) in the order of work."""

    lo: int
    hi: int

    def __len__(self) -> int:
        """Return the number of items."""
        return self.hi - self.lo


class RunKey(TypedDict):
    """Identity of a run, without the path of its folder, because folders can be moved.

    Keys:
        id: The run's id.
        name: Name of its folder in the default parent folder; None if the caller names the folder.
    """

    id: str
    name: str | None


PART_COLUMN: Final = "part"
"""Column of the parts of documents: an object with :data:`PART_FIELDS`."""
PART_FIELDS: Final[Mapping[str, type]] = {
    "document": str,
    "number": int,
    "of": int,
    "start": int,
    "end": int,
}
"""Fields of that column, with the types of their values."""
