"""The answer about a part that is asked in pieces, from the ends of these."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from fanfold.backends.core.errors import RunStoppedError
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


async def test_pieces_that_are_asked_together_do_not_wait_for_each_other() -> None:
    context = replace(make_context(), asks_pieces_together=True)
    both = asyncio.Barrier(2)
    ends = iter(["second", "first"])

    async def ask(state: ItemState) -> ItemState:
        await both.wait()
        start = state["row"][PART_COLUMN]["start"]
        await asyncio.sleep(0 if start else 0.01)  # the later piece ends first
        return {"output": f"{next(ends)} {start}", "raw": "a", "repairs": 0}

    found = await ask_pieces(make_state(), context, ask)
    first, second = str(found["output"]).split("\n\n")
    assert (first, second.partition(" ")[0]) == ("first 0", "second")
    assert [piece["start"] > 0 for piece in found["pieces"]] == [False, True]


async def test_a_stop_of_one_piece_ends_the_others() -> None:
    context = replace(make_context(), asks_pieces_together=True)
    ended = list[str]()

    async def ask(state: ItemState) -> ItemState:
        if state["row"][PART_COLUMN]["start"]:
            raise RunStoppedError("the service is gone")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("first")
        return {}

    with pytest.raises(RunStoppedError, match="the service is gone"):
        await ask_pieces(make_state(), context, ask)
    assert ended == ["first"]
