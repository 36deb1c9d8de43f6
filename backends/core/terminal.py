"""Text for people: counts of things, and escapes for text of models, servers and files."""

from __future__ import annotations

import re
from typing import Final

CONTROLS: Final = re.compile(
    r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
    r"|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that a terminal interprets, other than tabs and line ends: C0, DEL and C1 with the
escape sequences that they begin, marks that change the direction of text, and halves of
surrogate pairs."""


def escape_controls(text: str) -> str:
    r"""Return a text with terminal control characters spelled out, as ``\x1b``."""
    if text.isprintable():
        return text
    return CONTROLS.sub(_escape, text)


def escape_json(text: str) -> str:
    r"""Return JSON text with the same value, control characters escaped as ``\u009b``."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def count_nouns(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number of things, with the plural where it is due: by default with an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"  # noqa: PLR2004 - two digits
