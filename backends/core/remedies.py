"""What to do about the errors of items; ``docs/results.md`` shows the same table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Remedy:
    """What to do about items that failed with an error class.

    Attributes:
        text: The remedy.
        is_retry: Whether the items can be retried in the same run. If not, the remedy is a setting
            of ``task``, ``model`` or ``input``, which cannot change within a run.
    """

    text: str
    is_retry: bool = True


_REMEDIES: Final[Mapping[str, Remedy]] = {
    "InvalidItemError": Remedy("correct the row, extend the run", is_retry=False),
    "TruncatedAnswerError": Remedy(
        "raise model.max_tokens, extend the run; if the context is full, shorten the item or "
        "serve the model with a longer context",
        is_retry=False,
    ),
    "EmptyAnswerError": Remedy(
        "a reasoning model may need a larger model.max_tokens; else retry",
    ),
    "RefusedAnswerError": Remedy("change the prompt or the item", is_retry=False),
    "InvalidAnswerError": Remedy(
        "read the rejected text (raw in the journal); simplify the schema, state it in the prompt, "
        "or raise task.repairs",
        is_retry=False,
    ),
    "AnswerError": Remedy("look at the model server"),
    "PromptTooLongError": Remedy(
        "shorten the item or split it (input.split), or serve the model with a longer context",
        is_retry=False,
    ),
    "RequestRefusedError": Remedy("read the message: it quotes the server"),
    "ModelNotServedError": Remedy("check model.name, endpoints.models and the URL"),
    "AuthenticationError": Remedy("check endpoints.api_key or the token command"),
    "EndpointBusyError": Remedy("retry later, or lower limits.streams and the rate limits"),
    "EndpointLostError": Remedy(
        "check the server; raise limits.request_timeout_s if answers take longer"
    ),
    "EndpointReplyError": Remedy(
        "check URL and proxies; raise limits.body_bytes or lower model.max_tokens"
    ),
    "EndpointError": Remedy("look at the log of the model server"),
    "ItemTimeoutError": Remedy("raise the limit"),
    "TooManyStepsError": Remedy("raise the limit, or correct the graph"),
    "ItemGraphError": Remedy("return the question as the output of the item"),
}

_ANY_OTHER: Final = Remedy("correct task.graph")


def find_remedy(error_class: str) -> Remedy:
    """Return the remedy for an error class; unknown ones are exceptions of ``task.graph``."""
    return _REMEDIES.get(error_class, _ANY_OTHER)
