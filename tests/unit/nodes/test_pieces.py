"""The answer about a part that is asked in pieces, from the ends of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fanfold.backends.core.templates import ItemPrompt
from fanfold.backends.core.types import PART_COLUMN, Message
from fanfold.nodes.context import ItemContext
from fanfold.nodes.item.answer import AnswerCheck
from fanfold.nodes.item.item_state import ItemState
from fanfold.nodes.item.part import PartSplit
from fanfold.nodes.item.pieces import ask_pieces

TEXT = "One sentence of some words. " * 40


class _NoModel:
    async def ask(self, messages: Sequence[Message]) -> Any:  # noqa: ARG002 - the protocol
        raise AssertionError("the steps of the pieces are given")


def make_context() -> ItemContext:
    prompt = ItemPrompt.parse({"prompt": "{text}"})
    return ItemContext(prompt, _NoModel(), AnswerCheck(None, 9), split=PartSplit("text", 0, None))


def make_state() -> ItemState:
    """Return the state of a part whose answer was cut, with reasoning before it."""
    about = {"document": "d", "number": 1, "of": 1, "start": 0, "end": len(TEXT)}
    why = {"class": "TruncatedAnswerError", "text": "cut"}
    return {
        "id": "d/p1",
        "row": {"text": TEXT, PART_COLUMN: about},
        "too_long": why,
        "reasoning": "whole",
    }


@pytest.mark.parametrize(
    ("thoughts", "joined"),
    [(["first", "second"], "first\n\nsecond"), ([None, "second"], "second"), ([None, None], None)],
)
async def test_the_reasoning_is_that_of_the_pieces(
    thoughts: list[str | None], joined: str | None
) -> None:
    ends = iter(thoughts)

    async def ask(_: ItemState) -> ItemState:
        end: ItemState = {"output": "a", "raw": "a", "repairs": 0}
        thought = next(ends)
        return end if thought is None else {**end, "reasoning": thought}

    state = make_state()
    state |= await ask_pieces(state, make_context(), ask)
    assert state["reasoning"] == joined
    assert state["output"] == "a"


async def test_a_piece_that_fails_leaves_nothing_of_the_whole_answer() -> None:
    async def ask(_: ItemState) -> ItemState:
        return {"error": {"class": "EndpointLostError", "text": "lost"}}

    state = make_state()
    state |= await ask_pieces(state, make_context(), ask)
    assert state["reasoning"] is None
    assert state["error"]["class"] == "EndpointLostError"


async def test_repairs_of_all_pieces_count() -> None:
    """Also those of a piece that was split because its repair was too long."""
    inner = [{"start": 0, "end": 9, "repairs": 1}, {"start": 9, "end": 20, "repairs": 0}]
    ends: list[ItemState] = [{"repairs": 2, "pieces": inner}, {"repairs": 1}]

    async def ask(_: ItemState) -> ItemState:
        return {"output": "a", "raw": "a", **ends.pop(0)}

    found = await ask_pieces(make_state(), make_context(), ask)
    assert [piece["repairs"] for piece in found["pieces"]] == [3, 0, 1]
