"""First step of an item: from its columns to the question."""

from __future__ import annotations

from langgraph.runtime import Runtime

from ..backends.contract.errors import FanfoldError, InvalidItemError
from .context import ItemContext
from .state import ItemState


def failure(error: FanfoldError) -> dict[str, str]:
    """Return an error as data: its class and its text."""
    return {"class": type(error).__name__, "text": error.message}


async def prepare(state: ItemState, runtime: Runtime[ItemContext]) -> ItemState:
    """Write the messages that ask about the item; an invalid item ends here, unpaid."""
    context = runtime.context
    try:
        if problem := state.get("problem"):
            raise InvalidItemError(problem)
        question = {"role": "user", "content": context.prompt.render(state["row"])}
    except InvalidItemError as error:
        return {"error": failure(error)}
    system = [{"role": "system", "content": context.system}] if context.system else []
    return {"messages": [*system, question], "repairs": 0}
