"""What is injected: the seams between nodes and the parts that do the work."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol, runtime_checkable

from .types import Json, Message, Reply


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


@runtime_checkable
class Backend(Protocol):
    """A place where shards run. It carries JSON there and back and knows nothing else.

    Relied upon: one summary per order, or an error, or nothing at all. Not relied upon: order,
    exactly-once, cancellation, types of remote exceptions.
    """

    @property
    def name(self) -> str:
        """Return what messages call it."""
        ...

    def capacity(self) -> int:
        """Return how many shards it can work on at a time, now."""
        ...

    async def start(self) -> None:
        """Make it ready.

        Raises:
            ConfigurationError: It cannot be, whatever is tried again.
            SiteError: It could not be this time.
        """
        ...

    async def submit(self, order: dict[str, Json]) -> dict[str, Json]:
        """Have one order worked on, once.

        Returns:
            The worker's summary.

        Raises:
            WorkerLostError: The worker or the connection to it died; others may live.
            SiteError: The place itself is down; :meth:`rebuild` may help.
        """
        ...

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        """Return, by shard, what an earlier coordinator of the run left here; often nothing."""
        ...

    async def rebuild(self) -> None:
        """Throw what is broken away and make it ready anew."""
        ...

    async def close(self, grace_s: float = 10.0) -> None:
        """Give everything back within ``grace_s``, whatever still runs."""
        ...


@runtime_checkable
class Stoppable(Protocol):
    """A backend that can tell its workers to stop; others rely on the run folder's stop file."""

    async def stop(self) -> None:
        """Ask the workers to begin no further item; their summaries come as ever."""
        ...
