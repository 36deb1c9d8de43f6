"""What one request costs: reserved before it is sent, settled when it has ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from ..core.errors import ConfigurationError
from ..core.protocols import CallLog, Hold, Share
from ..core.types import Usage
from .endpoint import Endpoint, Mark
from .failures import Failure

_TEMPLATE: Final = 64
"""Tokens that a chat template adds of its own: markers, a standing system text."""
_PER_MESSAGE: Final = 8
_CUT_OFF: Final = frozenset({200, 408, 499, 502, 504, 520, 522, 524})
"""Statuses with which an answer was lost on its way: the server itself may have written it."""
_NOTHING: Final = Usage()


def most_tokens(body: Mapping[str, Any]) -> Usage:
    """Return the most tokens that a request may use.

    The tokenizers of today's models work on bytes: a token stands for one byte at least.
    """
    texts = [body["messages"], body.get("tools"), body.get("response_format")]
    size = sum(len(orjson.dumps(text)) for text in texts if text)
    prompt = size + _PER_MESSAGE * len(body["messages"]) + _TEMPLATE
    answer = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    return Usage(prompt, int(answer) * int(body.get("n") or 1))


@dataclass(slots=True, eq=False)
class Charge:
    """One request on behalf of an item; the first end that is told counts.

    Attributes:
        log: The item's log, or None.
        body: The request.
        hold: What is reserved for it; None when nothing limits it, or it has ended.
        ended: Whether its end is known.
        share: What its endpoint does for the item; None until it is sent, or without a log.
        attempt: What the item's record tells of the request; None as for ``share``, or where the
            record has enough of them.
        began: Monotonic time in seconds when it was sent.
        marks: Endpoints that have refused the call for now before, and what each had done then;
            None for its first request.
    """

    log: CallLog | None
    body: Mapping[str, Any]
    hold: Hold | None = None
    ended: bool = False
    share: Share | None = None
    attempt: dict[str, Any] | None = None
    began: float = 0.0
    marks: Mapping[Endpoint, Mark] | None = None

    @classmethod
    async def open(cls, log: CallLog | None, body: Mapping[str, Any]) -> Charge:
        """Reserve what a request may cost.

        Raises:
            BudgetExhaustedError: The budget does not carry it.
            ConfigurationError: Nothing bounds its answer.
        """
        if log is None or log.account is None:
            return cls(log, body)
        if not (body.get("max_completion_tokens") or body.get("max_tokens")):
            msg = (
                "a budget is set, and a request has no max_tokens: nothing bounds what it takes; "
                "leave the model's max_tokens as it is given, or set one where the model is called"
            )
            raise ConfigurationError(msg)
        return cls(log, body, await log.account.hold(most_tokens(body), body, log))

    def again(self) -> Charge | None:
        """Reserve the same for a second request, if there is room at once."""
        if self.log is None or self.log.account is None:
            return Charge(self.log, self.body, marks=self.marks)
        hold = self.log.account.hold_now(most_tokens(self.body))
        return None if hold is None else Charge(self.log, self.body, hold, marks=self.marks)

    def sent(self, endpoint: Endpoint) -> None:
        """Count the request: it is on its way."""
        if self.log is not None:
            self.log.requests += 1
            self.share = self.log.share(endpoint.label, endpoint.stats)
            self.share.requests += 1
            self.attempt, self.began = self.log.begin_attempt(endpoint.label), time.monotonic()

    def answered(self, usage: Usage, model: str | None) -> None:
        """Settle a request that was answered.

        Args:
            usage: What the answer says of its tokens.
            model: The model's name in it.
        """
        self._end_attempt("answered")
        if self._end() and self.hold is not None:
            self.hold.settle(usage)
        if self.log is not None and self.share is not None:
            self.log.usage += usage
            self.log.model = self.share.model = model
            self.share.usage += usage

    def failed(self, failure: Failure) -> Usage:
        """Settle a request that failed; return the tokens that may have been paid for nothing."""
        if self.log is not None and self.share is not None:
            self.log.endpoint = self.share.endpoint
        self._end_attempt(type(failure.error).__name__)
        status = failure.error.status
        if status in _CUT_OFF or (status is None and not failure.treatment.free):
            return self.lost()
        self.free(sent=status is not None)
        return _NOTHING

    def lost(self) -> Usage:
        """Settle a request whose answer is lost; return the tokens that it may have cost."""
        if not self._end():
            return _NOTHING
        self._end_attempt("cancelled")
        most = most_tokens(self.body) if self.hold is None else self.hold.keep()
        if self.log is not None:
            self.log.lost += most
        if self.share is not None:
            self.share.lost += most
        return most

    def free(self, *, sent: bool) -> None:
        """Settle a request that nobody has read."""
        if self._end() and self.hold is not None:
            self.hold.free(sent=sent)

    def _end_attempt(self, outcome: str) -> None:
        """Tell how the request ended, once."""
        if self.attempt is not None:
            self.attempt["seconds"] = int(1000 * (time.monotonic() - self.began)) / 1000
            self.attempt["outcome"] = outcome
            self.attempt = None

    def _end(self) -> bool:
        first, self.ended = not self.ended, True
        return first
