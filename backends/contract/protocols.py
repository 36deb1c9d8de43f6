"""What is injected: the seams between nodes and the parts that do the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from .types import Message, Reply


@runtime_checkable
class ChatModel(Protocol):
    """Something that answers chat messages: the fleet, by its lower or its LangChain door."""

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Answer one conversation.

        Args:
            messages: Chat messages in OpenAI's form, oldest first.

        Returns:
            The reply as it came; its content and finish reason are for the caller to judge.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: Asking on is hopeless for every item.
        """
        ...
