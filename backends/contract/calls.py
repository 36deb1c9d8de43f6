"""Which item a model call belongs to, whoever makes it.

fanfold's own nodes and a user's ``task.graph`` call the same fleet. The fleet notes every call
in the log of the item on whose behalf it runs, found through a context variable, so that tasks
and threads that the item's graph starts are counted too.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from .types import Usage


@dataclass(slots=True)
class CallLog:
    """The calls of one item.

    Attributes:
        requests: Requests sent, failed ones and retries included.
        usage: Tokens over all answers.
        endpoint: Label of the endpoint that answered last, or that failed last.
        model: Model's name in the last answer.
        simulated: Whether the last answer came from a simulated fleet.
    """

    requests: int = 0
    usage: Usage = field(default_factory=Usage)
    endpoint: str | None = None
    model: str | None = None
    simulated: bool | None = None


CURRENT_CALLS: Final[ContextVar[CallLog | None]] = ContextVar("fanfold_calls", default=None)
