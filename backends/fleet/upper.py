"""The upper door: through LangChain, with the same protocol as the lower one.

It stands apart because LangChain and the SDK take half a second to import, which a worker that
traces nothing never needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai
from langchain_core.messages import AIMessage
from langchain_core.messages.ai import UsageMetadata

from ..core.errors import EndpointError
from ..core.types import SIMULATED_FINGERPRINT, Message, Reply, Usage
from ..core.values import token_count
from .langchain import ChatFleet


class LangChainModel:
    """The upper door: through a chat model, so that callbacks, traces and streams see the call.

    LangGraph's ambient configuration applies, for ``ainvoke`` reads it.

    Args:
        chat: The model.
    """

    def __init__(self, chat: ChatFleet) -> None:
        self._chat = chat

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Answer one conversation.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: Asking on is hopeless for every item.
        """
        try:
            answer = await self._chat.ainvoke(list(messages))
        except (openai.OpenAIError, ValueError, TypeError, LookupError) as error:
            if isinstance(error.__cause__, EndpointError):
                raise error.__cause__ from error.__cause__.__cause__
            raise
        return _reply(answer)


def _reply(answer: AIMessage) -> Reply:
    about: dict[str, Any] = answer.response_metadata
    return Reply(
        content=str(answer.text),  # a plain str: orjson takes no subclass
        finish_reason=about.get("finish_reason"),
        refusal=answer.additional_kwargs.get("refusal"),
        usage=_usage(answer.usage_metadata),
        endpoint=about.get("endpoint") or "",
        model=about.get("model_name") or "",
        simulated=about.get("system_fingerprint") == SIMULATED_FINGERPRINT,
        cached=about.get("endpoint") is None,
    )


def _usage(usage: UsageMetadata | None) -> Usage:
    if usage is None:
        return Usage()
    cached = usage.get("input_token_details", {}).get("cache_read")
    return Usage(
        token_count(usage["input_tokens"]),
        token_count(usage["output_tokens"]),
        token_count(cached),
    )
