"""Tokens, counted the same way for prompts, answers, limits and ``/tokenize``.

A token is four UTF-8 bytes, rounded up; a message adds 4 and a conversation 3, as chat templates
do. The numbers are plausible, not a tokenizer's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import orjson

_BYTES: Final = 4
_PER_MESSAGE: Final = 4
_PER_CONVERSATION: Final = 3


def text_tokens(text: str) -> int:
    """Count the tokens of a text.

    Args:
        text: Any text.

    Returns:
        A quarter of its UTF-8 bytes, rounded up.
    """
    size = len(text) if text.isascii() else len(text.encode())
    return -(-size // _BYTES)


def conversation_tokens(messages: Iterable[dict[str, Any]]) -> int:
    """Count the tokens of a conversation.

    Args:
        messages: Chat messages in OpenAI's form.

    Returns:
        The prompt's tokens.
    """
    return _PER_CONVERSATION + sum(
        text_tokens(message_text(message)) + _PER_MESSAGE for message in messages
    )


def message_text(message: dict[str, Any]) -> str:
    """Return the text of a message.

    Args:
        message: One chat message; its content a string, a list of parts, or None.

    Returns:
        The text; parts and tool calls that are no text stand in it as JSON.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [p["text"] if _is_text(p) else orjson.dumps(p).decode() for p in parts]
    if calls := message.get("tool_calls"):
        texts.append(orjson.dumps(calls).decode())
    return "\n".join(texts)


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def cut(text: str, tokens: int) -> str:
    """Cut a text after some tokens, never inside a character.

    Args:
        text: The whole text.
        tokens: Most tokens to keep.

    Returns:
        The beginning of the text.
    """
    return text.encode()[: tokens * _BYTES].decode(errors="ignore")
