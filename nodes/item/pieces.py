"""Ask about a part of a document in pieces, because it is too long for the model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from ...backends.core.aio import detach_task
from ...backends.core.errors import FanfoldError
from ...backends.core.protocols import CURRENT_CALLS
from ...backends.core.types import PART_COLUMN, Row
from ..context import ItemContext
from .item_state import ItemState


async def ask_pieces(
    state: ItemState, context: ItemContext, ask: Callable[[ItemState], Awaitable[ItemState]]
) -> ItemState:
    """Return the answer about a part from those about its pieces; an item without any fails.

    The pieces are asked one after the other, so that an item has one request in flight, unless
    ``context.asks_pieces_together``. Their answers are stored until the item has ended: a later
    session does not pay for them again.

    Args:
        state: The state of an item whose prompt is too long.
        context: What the item may use.
        ask: Takes the steps of an item with a piece.

    Raises:
        RunStoppedError: The run ends before the item does.
    """
    rows = [] if context.split is None else context.split.cut(state["row"])
    if not rows or context.split is None:
        return {"error": state["too_long"]}
    calls, ends, places = CURRENT_CALLS.get(), list[ItemState](), list[dict[str, int]]()
    if calls is not None:
        calls.keeps_answers = True

    async def ask_one(row: Row) -> ItemState:
        end = await ask(ItemState(id=state["id"], row=row, problem=None))
        if calls is not None and "error" not in end:
            calls.keep_answer()
        return end

    asked = await _ask_together(ask_one, rows) if context.asks_pieces_together else None
    for number, row in enumerate(rows):
        end = await ask_one(row) if asked is None else asked[number]
        about = row[PART_COLUMN]
        if "error" in end:
            return _fail(end, f"characters {about['start']:,} to {about['end']:,} of the document")
        ends.append(end)
        own = {"start": about["start"], "end": about["end"], "repairs": end.get("repairs", 0)}
        first, *more = end.get("pieces") or [own]
        if more:  # it was sent back before its prompt became too long
            first = {**first, "repairs": first["repairs"] + own["repairs"]}
        places += [first, *more]
    joined: ItemState = {
        "output": context.split.join(
            [end["output"] for end in ends], [row[PART_COLUMN] for row in rows]
        ),
        "pieces": places,
    }
    joined["raw"] = "\n\n".join(end["raw"] for end in ends)
    reasoning = [str(end["reasoning"]) for end in ends if end.get("reasoning")]
    if reasoning or "reasoning" in state:  # that of a whole answer, which was cut, must not stay
        joined["reasoning"] = "\n\n".join(reasoning) or None
    if context.certainty is not None:
        joined["certainty"] = _find_least([end.get("certainty") for end in ends])
    return joined


async def _ask_together(
    ask: Callable[[Row], Coroutine[Any, Any, ItemState]], rows: Sequence[Row]
) -> list[ItemState]:
    """Ask about all pieces at the same time; return how they ended, in order.

    Raises:
        RunStoppedError: The run ends before the item does; no piece is waited for.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [detach_task(group.create_task(ask(row))) for row in rows]
    except* FanfoldError as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _fail(end: ItemState, where: str) -> ItemState:
    """Return the end of an item by that of one of its pieces."""
    error = {**end["error"], "text": f"{end['error']['text']} ({where})"}
    failed: ItemState = {"error": error, "reasoning": end.get("reasoning")}
    if "raw" in end:
        failed["raw"] = end["raw"]
    return failed


def _find_least(values: Sequence[Any]) -> float | None:
    """Return the least certainty; None if that of a piece is unknown."""
    return None if None in values else min(values)
