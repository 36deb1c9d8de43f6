"""First step of an item: turn its columns into messages."""

from __future__ import annotations

from ...backends.core.errors import FanfoldError, InvalidItemError
from ...backends.core.images import add_images
from ...backends.core.values import replace_surrogates
from ..context import ItemRuntime
from .item_state import ItemState


def make_item_error(error: BaseException) -> dict[str, str]:
    """Return an error as data: class and text."""
    text = error.message if isinstance(error, FanfoldError) else str(error) or repr(error)
    return {"class": type(error).__name__, "text": replace_surrogates(text)}


async def prepare(state: ItemState, runtime: ItemRuntime) -> ItemState:
    """Build the messages for the item; an invalid item ends here, without a request."""
    context = runtime.context
    try:
        if problem := state.get("problem"):
            raise InvalidItemError(problem)
        messages = context.prompt.build_messages(state["row"])
        if context.images is None:
            return {"messages": messages, "repairs": 0}
        images = await context.images.read(state["id"], state["row"])
        return {
            "messages": add_images(messages, images),
            "images": [image.describe() for image in images],
            "repairs": 0,
        }
    except InvalidItemError as error:
        return {"error": make_item_error(error)}
