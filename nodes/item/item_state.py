"""State of the item graph: JSON-safe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from ...backends.core.types import Json, Message


class ItemState(TypedDict, total=False):
    """State of one item.

    Keys:
        id: The item's name.
        row: Its columns.
        problem: Why no request may be sent for it, or None.
        messages: The conversation so far.
        images: What its record says of its images.
        reply: The last reply: content, finish_reason, refusal; its reasoning, if the server sent it
            apart; its logprobs, if the task asks for a certainty; unless it ended regularly, also
            its completion_tokens and the max_tokens that were sent, or None where unknown.
        repairs: How often the answer was sent back.
        output: The valid answer, once there is one.
        error: Class and text of what ended the item, if it failed.
        too_long: Class and text of why the prompt is too long for the model, if it is.
        pieces: The pieces in which the item was asked, if it was: ``start`` and ``end`` in the text
            of the document, and ``repairs``.
        raw: Text of the last rejected answer, or of the last answer, without its reasoning.
        reasoning: The reasoning before the last answer, or None.
        certainty: The probability that the server gave to the value of a field, if the task asks
            for it; None if the server said none.
    """

    id: str
    row: dict[str, Any]
    problem: str | None
    messages: list[Message]
    images: list[dict[str, Json]]
    reply: dict[str, Any]
    repairs: int
    output: Json
    error: dict[str, str]
    too_long: dict[str, str]
    pieces: list[dict[str, int]]
    raw: str
    reasoning: str | None
    certainty: float | None


class ItemInput(TypedDict):
    """Input of the item graph: one item."""

    id: Annotated[str, Field(description="The item's name.")]
    row: Annotated[
        dict[str, Any],
        Field(
            description="Its columns, which the prompt names.",
            examples=[{"smiles": "CC(=O)Oc1ccccc1C(=O)O"}],
        ),
    ]


class ItemOutput(TypedDict, total=False):
    """Result of an item: an answer, or an error."""

    id: str
    output: Json
    error: dict[str, str]
