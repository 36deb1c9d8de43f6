"""Tokens by the look of a text, for where nobody offers the model's own tokenizer.

Four bytes to a token hold for English prose and fail for what scientists send: formulas, numbers,
sequences and other scripts take up to three times as many. Words, capitals, digits, signs and other
scripts are therefore weighed apart; against the vocabularies of OpenAI's models the sum came to
1.0 to 1.6 times the tokens for prose, tables, code, SMILES, proteins and Chinese. It is meant to be
high rather than low.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

_RUN: Final = re.compile(r"[A-Za-z]+|\s?[0-9]+|[^\x00-\x7f]+|[^\sA-Za-z0-9]|\n\s*|  +")
_MESSAGE: Final = 8
"""Tokens that a chat template puts around a message."""
_CONVERSATION: Final = 8
LIKELY: Final = 0.8
"""What the tokens usually come to, as a share of the figure given here."""
LEAST: Final = 0.55
"""The same at the lower end."""


def text_tokens(text: str) -> int:
    """Return about how many tokens a text has, high rather than low."""
    return sum(map(_weight, _RUN.findall(text)))


def _weight(run: str) -> int:
    if not run.isascii():
        return -(-9 * len(run.encode(errors="replace")) // 20)
    if run.isalpha():
        word = run[1:].islower() or len(run) == 1
        return 1 + (len(run) - 1) // 4 if word else 1 + 3 * (len(run) - 1) // 4
    if run[-1].isdigit():
        digits = len(run) if run[0].isdigit() else len(run) - 1
        return (digits < len(run)) + -(-digits // 3)
    return 1


def prompt_tokens(body: Mapping[str, Any]) -> int:
    """Return about how many tokens a request's prompt has, high rather than low.

    Args:
        body: The request: ``messages``, and ``tools`` and ``response_format`` if there are any.
    """
    return prompt_sum(body, text_tokens)


def prompt_sum(
    body: Mapping[str, Any],
    count: Callable[[str], int],
    message: int = _MESSAGE,
    conversation: int = _CONVERSATION,
) -> int:
    """Add up the tokens of all that a request's prompt is made of.

    Args:
        body: The request.
        count: Counts the tokens of one text.
        message: Tokens that the chat template puts around each message.
        conversation: Tokens that it puts around all of them.
    """
    messages = body["messages"]
    total = sum(count(message_text(one)) for one in messages)
    total += conversation + message * len(messages)
    extras = (body.get(key) for key in ("tools", "response_format"))
    total += sum(count(orjson.dumps(extra).decode()) for extra in extras if extra)
    return total


def message_text(message: Mapping[str, Any]) -> str:
    """Return all text of a message; what is no text stands in it as JSON."""
    content, calls = message.get("content"), message.get("tool_calls")
    parts = [content] if isinstance(content, str) else list(content or ())
    texts = [p if isinstance(p, str) else _part(p) for p in parts]
    return "\n".join([*texts, *([orjson.dumps(calls).decode()] if calls else [])])


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) else orjson.dumps(part).decode()
