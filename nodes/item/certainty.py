"""The probability that a server gave to the value of one field of an answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

_BLANKS: Final = re.compile(r"[ \t\r\n]*")
_DECODER: Final = json.JSONDecoder()


def read_certainty(text: str, logprobs: Any, keys: Sequence[str]) -> float | None:
    """Return the probability of the tokens that make up the value of a field.

    Args:
        text: The answer, JSON text that may be enclosed in other text.
        logprobs: The log probabilities as the server sent them, in OpenAI's form.
        keys: Keys down to the field; none is the whole answer.

    Returns:
        The product of the probabilities, or None if the server sent none or they do not fit.
    """
    tokens = _read_tokens(logprobs)
    span = find_value(text, keys)
    if not tokens or span is None:
        return None
    whole = b"".join(token for token, _ in tokens)
    data = text.encode(errors="replace")
    first = whole.rfind(data)
    if first < 0:
        return None
    lo = first + len(text[: span[0]].encode(errors="replace"))
    hi = first + len(text[: span[1]].encode(errors="replace"))
    ends = accumulate((len(token) for token, _ in tokens), initial=0)
    total = math.fsum(
        logprob
        for (start, end), (_, logprob) in zip(pairwise(ends), tokens, strict=True)
        if start < hi and end > lo
    )
    return min(1.0, math.exp(min(0.0, total)))


def _read_tokens(logprobs: Any) -> list[tuple[bytes, float]]:
    """Return the tokens and their log probabilities; none if one of them is malformed."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    found = list[tuple[bytes, float]]()
    for one in content if isinstance(content, list) else ():
        token, value = (one.get("token"), one.get("logprob")) if isinstance(one, dict) else (0, 0)
        if not isinstance(token, str) or isinstance(value, bool):
            return []
        if not isinstance(value, int | float) or math.isnan(value):
            return []
        found.append((_read_bytes(one.get("bytes"), token), float(value)))
    return found


def _read_bytes(listed: Any, token: str) -> bytes:
    """Return the bytes of a token, which may be a part of a character only."""
    try:
        return bytes(listed) if isinstance(listed, list) else token.encode(errors="replace")
    except (TypeError, ValueError):
        return token.encode(errors="replace")


def find_value(text: str, keys: Sequence[str]) -> tuple[int, int] | None:
    """Return where the value of a field begins and ends; of a text, without its first quote.

    Args:
        text: JSON text, which may follow other text.
        keys: Keys down to the field; none is the whole value.
    """
    for start in _list_starts(text, bool(keys)):
        try:
            return _find_within(text, start, keys)
        except (ValueError, IndexError, RecursionError):
            continue
    return None


def _list_starts(text: str, is_object: bool) -> Iterator[int]:
    if not is_object:
        yield _skip(text, 0)
    at = text.find("{")
    while at >= 0:
        yield at
        at = text.find("{", at + 1)


def _skip(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return at if found is None else found.end()


def _find_within(text: str, at: int, keys: Sequence[str]) -> tuple[int, int]:
    if not keys:
        _, end = _DECODER.raw_decode(text, at)
        return (at + 1 if text[at] == '"' else at), end
    if text[at] != "{":
        raise ValueError("not an object")
    at = _skip(text, at + 1)
    while text[at] == '"':
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)
        if key == keys[0]:
            return _find_within(text, at, keys[1:])
        _, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] != ",":
            break
        at = _skip(text, at + 1)
    raise ValueError("the object lacks the field")
