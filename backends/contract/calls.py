"""Which item a model call belongs to, whoever makes it, and what it may cost.

fanfold's own nodes and a user's ``task.graph`` call the same fleet. The fleet notes every call
in the log of the item on whose behalf it runs, found through a context variable, so that tasks
and threads that the item's graph starts are counted too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

from .types import Usage

Count: TypeAlias = Callable[[Mapping[str, Any]], Awaitable[int | None]]
"""Counts the tokens of a request's prompt as the model does; None when nobody can."""


class Hold(Protocol):
    """What is reserved for one request; the first of the three that is called ends it."""

    def settle(self, usage: Usage) -> None:
        """Take what an answer used, and give the rest back; all of it if it does not say."""
        ...

    def keep(self) -> None:
        """Take all of it: the request may have been paid, and its answer is lost."""
        ...

    def free(self, *, sent: bool) -> None:
        """Give it back: nothing was read; a request that was sent counts all the same."""
        ...


class Account(Protocol):
    """What one item may spend."""

    async def hold(self, most: Usage, body: Mapping[str, Any]) -> Hold:
        """Reserve what one request may cost, waiting for what others may give back.

        Args:
            most: The most tokens that it may use.
            body: The request, to be counted better when room is scarce.

        Raises:
            BudgetExhaustedError: What is left does not carry it, and nobody gives anything back.
        """
        ...

    def hold_now(self, most: Usage) -> Hold | None:
        """Reserve what one request may cost if there is room at once."""
        ...

    def close(self) -> None:
        """Give back what no request has taken; the item has ended."""
        ...


@dataclass(slots=True)
class CallLog:
    """The calls of one item.

    Attributes:
        requests: Requests sent, failed ones and retries included.
        usage: Tokens over all answers.
        endpoint: Label of the endpoint that answered last, or that failed last.
        model: Model's name in the last answer.
        simulated: Whether the last answer came from a simulated fleet.
        lost: The most tokens of requests that may have been paid and brought no answer.
        useful: Tokens of the answer that counts; None: of all answers.
        account: What the item may spend; None is no limit.
        reused: Answers taken from earlier requests, which cost nothing.
    """

    requests: int = 0
    usage: Usage = field(default_factory=Usage)
    endpoint: str | None = None
    model: str | None = None
    simulated: bool | None = None
    lost: Usage = field(default_factory=Usage)
    useful: Usage | None = None
    account: Account | None = None
    reused: int = 0


CURRENT_CALLS: Final[ContextVar[CallLog | None]] = ContextVar("fanfold_calls", default=None)
