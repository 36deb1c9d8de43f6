"""Prompt templates: text with column names in braces, and nothing that could be executed.

``{name}`` stands for the column ``name``, taken literally (blanks and dots included);
``{{`` and ``}}`` stand for single braces. There are no formats, attributes or indices, so an
untrusted template can do no more than show a column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import orjson

from .errors import ConfigurationError, InvalidItemError
from .types import Json

_TOKEN: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed prompt: ``parts`` alternates literal text (even) and column names (odd)."""

    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, where: str = "task.prompt") -> Template:
        """Parse a prompt.

        Raises:
            ConfigurationError: A brace stands alone or a name is empty.
        """
        parts, literal, at = list[str](), "", 0
        for match in _TOKEN.finditer(text):
            literal += text[at : match.start()]
            at = match.end()
            token, name = match.group(0), match.group(1)
            if token in ("{{", "}}"):
                literal += token[0]
            elif name is None or not name.strip():
                raise ConfigurationError(_lone_brace(text, match.start(), where))
            else:
                parts += [literal, name.strip()]
                literal = ""
        return cls((*parts, literal + text[at:]))

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that the prompt shows, in order, each once."""
        return tuple(dict.fromkeys(self.parts[1::2]))

    def render(self, row: Mapping[str, Json]) -> str:
        """Fill in one row; values that are no text become compact JSON, None becomes nothing.

        Raises:
            InvalidItemError: The row lacks a column.
        """
        try:
            return "".join(
                part if n % 2 == 0 else _text(row[part]) for n, part in enumerate(self.parts)
            )
        except KeyError as error:
            msg = f"the row has no column {error.args[0]!r}, which task.prompt shows"
            raise InvalidItemError(msg) from None


def _text(value: Json) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else orjson.dumps(value).decode()


def _lone_brace(text: str, at: int, where: str) -> str:
    line = text.count("\n", 0, at) + 1
    return (
        f"{where}: line {line}: a brace stands alone near {text[at : at + 20]!r}; "
        "write {column} for a column, {{ and }} for the characters"
    )
