"""The lower door: straight to the fleet; the upper one, through LangChain, is ``upper``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..core.types import Message, Reply
from . import judge
from .fleet import Fleet
from .params import ModelParams


class FleetModel:
    """The lower door: no LangChain between the question and the wire.

    It sends the same bodies as ``ChatFleet.of(fleet, params)``.

    Args:
        fleet: The endpoints.
        params: What every request has in common.
    """

    def __init__(self, fleet: Fleet, params: ModelParams) -> None:
        self._fleet = fleet
        self._constant = params.body()

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Answer one conversation.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: Asking on is hopeless for every item.
        """
        body = {**self._constant, "messages": messages}
        document, endpoint = await self._fleet.post(body)
        if endpoint is None:
            return replace(judge.reply_of(document, ""), cached=True)
        return judge.reply_of(document, endpoint.label)
