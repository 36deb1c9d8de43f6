"""What fits into an endpoint's context: the longest answer that it can be asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any, Final

import orjson

from ..core.errors import PromptTooLongError
from .answer import Complaint, RawAnswer
from .endpoint import Endpoint
from .failures import Failure, Step

_FIELDS: Final = ("max_completion_tokens", "max_tokens")
_NUMBER: Final = re.compile(r"(?<![\w.-])\d{1,9}(?![\w.-]*\d)")
"""A whole number by itself: no part of a name, a version or a date."""


def asked_tokens(body: Mapping[str, Any]) -> int | None:
    """Return the longest answer that a request asks for, in tokens, or None."""
    for field in _FIELDS:
        if isinstance(most := body.get(field), int):
            return most
    return None


def lowered(body: Mapping[str, Any], most: int) -> Mapping[str, Any]:
    """Return a request that asks for no longer an answer than ``most`` tokens."""
    above = [f for f in _FIELDS if isinstance(body.get(f), int) and body[f] > most]
    return {**body, **dict.fromkeys(above, most)} if above else body


def learn(
    endpoint: Endpoint, failure: Failure, body: Mapping[str, Any], asked: int | None
) -> Failure:
    """Take an endpoint's word for the longest answer that a request can ask for.

    The room that is left for an answer may depend on the prompt. So what an endpoint says holds
    for the request that it refused; for others only once it has said the same of a different
    request, and has never accepted more.

    Args:
        endpoint: Who refused.
        failure: What it said; only a refusal of the answer's length is looked at.
        body: The request.
        asked: The longest answer in tokens that it was sent with.

    Returns:
        The failure, to be repeated if less can be asked for.
    """
    cause = failure.error.__cause__
    if not failure.treatment.length or asked is None or not isinstance(cause, RawAnswer):
        return failure
    said = map(int, _NUMBER.findall(Complaint.read(cause.body).message))
    most = max((n for n in said if 0 < n < asked), default=None)
    if most is None:
        return failure
    if most >= endpoint.longest and endpoint.confirms(most, hash(orjson.dumps(body["messages"]))):
        endpoint.most_tokens = min(most, endpoint.most_tokens or most)
    return Failure(failure.error, replace(failure.treatment, step=Step.SAME, free=True), most)


def sent_tokens(body: Mapping[str, Any], most: int | None) -> int | None:
    """Return the longest answer in tokens that a request is sent with, or None.

    Args:
        body: The request.
        most: The longest answer that its endpoint can be asked for, or None when unknown.
    """
    asked = asked_tokens(body)
    return asked if asked is None or most is None else min(asked, most)


def elsewhere(
    endpoint: Endpoint, failure: Failure, alive: Iterable[Endpoint]
) -> tuple[Failure, Set[Endpoint]]:
    """Send a prompt that is too long for one endpoint to one with a longer context.

    Returns:
        The failure, to be repeated if there is one; and all endpoints that are too short.
    """
    room = endpoint.spec.max_model_len
    if not isinstance(failure.error, PromptTooLongError) or room is None:
        return failure, frozenset()
    short = {e for e in alive if (e.spec.max_model_len or 0) <= room}
    if short.issuperset(alive):
        return failure, frozenset()
    return Failure(failure.error, replace(failure.treatment, step=Step.OTHER)), short
