"""Third step of an item: check the reply; send it back, or end the item."""

from __future__ import annotations

from ...backends.core.errors import AnswerError, InvalidAnswerError, TruncatedAnswerError
from ...backends.core.parsing import split_reasoning
from ..context import ItemRuntime
from .certainty import read_certainty
from .item_state import ItemState
from .prepare import make_item_error


async def validate(state: ItemState, runtime: ItemRuntime) -> ItemState:
    """Check the reply against the schema; send an invalid one back while repairs remain."""
    context, reply = runtime.context, state["reply"]
    reasoning, content = split_reasoning(reply["content"], reply.get("reasoning"))
    found: ItemState = {}
    if reasoning is not None or state["repairs"]:  # that of an earlier answer must not stay
        found["reasoning"] = reasoning
    try:
        text = context.answer_check.check_finish(content, reply, has_reasoning=bool(reasoning))
        found["output"] = context.answer_check.check_value(text)
        found["raw"] = text
        if context.certainty is not None:
            found["certainty"] = read_certainty(text, reply.get("logprobs"), context.certainty)
    except InvalidAnswerError as error:
        if state["repairs"] < context.repairs:
            return found | _send_back(state, error)
        found |= {"error": make_item_error(error), "raw": error.raw}
    except TruncatedAnswerError as error:
        why = make_item_error(error)
        found["raw"] = error.raw
        found |= {"too_long": why} if error.is_context_full else {"error": why}
    except AnswerError as error:
        found |= {"error": make_item_error(error), "raw": error.raw}
    return found


def _send_back(state: ItemState, error: InvalidAnswerError) -> ItemState:
    answer = {"role": "assistant", "content": error.raw}
    request = {"role": "user", "content": f"{error.message}\nAnswer again, corrected."}
    return {
        "messages": [*state["messages"], answer, request],
        "repairs": state["repairs"] + 1,
        "raw": error.raw,
    }
