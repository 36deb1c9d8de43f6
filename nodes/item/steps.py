"""The item graph as data: its steps and their order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from ..context import ItemContext, ItemRuntime
from .delegate import delegate
from .infer import infer
from .item_state import ItemState
from .pieces import ask_pieces
from .prepare import prepare
from .request import request
from .validate import validate

ItemNode = Callable[[ItemState, ItemRuntime], Awaitable[ItemState]]

ItemEngine = Callable[[ItemState, ItemContext], Awaitable[ItemState]]
"""Runs the steps of one item and returns its final state."""

END: Final = "__end__"
"""LangGraph's name of the end of a graph. Importing it would import LangGraph, which a worker does
not need."""


@dataclass(frozen=True, slots=True)
class StepRuntime:
    """What steps are called with outside LangGraph's engine."""

    context: ItemContext


@dataclass(frozen=True, slots=True)
class ItemStep:
    """One step of an item.

    Attributes:
        run: The node.
        next_step: Names the next step from the state, or END.
        targets: Every name that ``next_step`` can return.
    """

    run: ItemNode
    next_step: Callable[[ItemState], str]
    targets: tuple[str, ...]


def next_unless_failed(target: str) -> Callable[[ItemState], str]:
    """Return a routing function: go to ``target``, or end an item that failed."""

    def then(state: ItemState) -> str:
        return END if "error" in state else target

    return then


def check_reply(state: ItemState) -> str:
    """Go on to the check of the reply, or to pieces if the prompt is too long."""
    if "too_long" in state:
        return "split"
    return END if "error" in state else "validate"


def repair_until_done(state: ItemState) -> str:
    """Return to the model while the item has neither output nor error."""
    if "too_long" in state:
        return "split"
    return END if "output" in state or "error" in state else "infer"


def end_item(state: ItemState) -> str:  # noqa: ARG001 - a routing function takes the state
    """End the item."""
    return END


async def split(state: ItemState, runtime: ItemRuntime) -> ItemState:
    """Ask about the pieces of a part that is too long; any other item fails.

    Each piece takes the steps of an item, so that one that is too long is split again.
    """
    context = runtime.context

    async def ask(piece: ItemState) -> ItemState:
        return await walk_steps(ITEM_STEPS, piece, context)

    return await ask_pieces(state, context, ask)


FIRST_STEP: Final = "prepare"

ITEM_STEPS: Final[Mapping[str, ItemStep]] = {
    "prepare": ItemStep(prepare, next_unless_failed("infer"), ("infer", END)),
    "infer": ItemStep(infer, check_reply, ("validate", "split", END)),
    "validate": ItemStep(validate, repair_until_done, ("infer", "split", END)),
    "split": ItemStep(split, end_item, (END,)),
}
"""The default item graph: prepare, infer, validate, and infer again to repair; split if the prompt
is too long."""

DELEGATED_STEPS: Final[Mapping[str, ItemStep]] = {
    "prepare": ItemStep(prepare, next_unless_failed("delegate"), ("delegate", END)),
    "delegate": ItemStep(delegate, end_item, (END,)),
}
"""The item graph that calls a user's ``task.graph``."""

REQUEST_STEPS: Final[Mapping[str, ItemStep]] = {
    "prepare": ItemStep(prepare, next_unless_failed("request"), ("request", END)),
    "request": ItemStep(request, end_item, (END,)),
}
"""The item graph for items that are requests themselves."""


async def walk_steps(
    steps: Mapping[str, ItemStep], state: ItemState, context: ItemContext
) -> ItemState:
    """Run the steps for one item and return its final state."""
    name, runtime = FIRST_STEP, StepRuntime(context)
    while name != END:
        step = steps[name]
        state |= await step.run(state, runtime)
        name = step.next_step(state)
    return state
