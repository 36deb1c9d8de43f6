"""First step of an item: turn its columns into messages."""

from __future__ import annotations

from langgraph.runtime import Runtime

from ...backends.core.errors import FanfoldError, InvalidItemError
from ...backends.core.templates import Template
from ...backends.core.types import Message, Row
from ...backends.core.values import replace_surrogates
from ..context import ItemContext
from ..state import ItemState


def make_item_error(error: BaseException) -> dict[str, str]:
    """Return an error as data: class and text."""
    text = error.message if isinstance(error, FanfoldError) else str(error) or repr(error)
    return {"class": type(error).__name__, "text": replace_surrogates(text)}


async def prepare(state: ItemState, runtime: Runtime[ItemContext]) -> ItemState:
    """Build the messages for the item; an invalid item ends here, without a request."""
    context = runtime.context
    try:
        if problem := state.get("problem"):
            raise InvalidItemError(problem)
        return {
            "messages": build_messages(
                context.system, context.prompt, state["row"], context.system_role
            ),
            "repairs": 0,
        }
    except InvalidItemError as error:
        return {"error": make_item_error(error)}


def build_messages(system: str, prompt: Template, row: Row, system_role: str) -> list[Message]:
    """Return the messages for one item.

    Args:
        system: The system text, or ``""``.
        prompt: The template of the question.
        row: The item's columns.
        system_role: Role of the system text; ``user`` puts it before the question, because some
            models refuse two messages of one role in a row.

    Raises:
        InvalidItemError: The row lacks a column.
    """
    text = prompt.render(row)
    if system and system_role == "user":
        return [{"role": "user", "content": f"{system}\n\n{text}"}]
    question = {"role": "user", "content": text}
    return [{"role": system_role, "content": system}, question] if system else [question]
