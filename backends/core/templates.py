"""Prompt templates and command lines with names in braces."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from .errors import ConfigurationError, InvalidItemError
from .types import Json

_MEMBER: Final = re.compile(r"""\s*(["'])[^"']*\1\s*:""")
"""How the text of a JSON object begins, after its brace."""
_SHOWN: Final = 40
_TOKEN: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed prompt: ``parts`` alternates literal text (even) and column names (odd)."""

    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, where: str = "task.prompt") -> Template:
        """Parse a prompt.

        Raises:
            ConfigurationError: A brace has no counterpart, a name is empty, or braces enclose JSON.
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
            elif _MEMBER.match(name):
                raise ConfigurationError(_literal_json(text, match.start(), token, where))
            else:
                parts += [literal, name.strip()]
                literal = ""
        return cls((*parts, literal + text[at:]))

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that the prompt uses, in order, each once."""
        return tuple(dict.fromkeys(self.parts[1::2]))

    def render(self, row: Mapping[str, Json]) -> str:
        """Fill in one row; a value that is not text becomes compact JSON, None becomes empty text.

        Raises:
            InvalidItemError: The row lacks a column.
        """
        try:
            return "".join(
                part if n % 2 == 0 else _text(row[part]) for n, part in enumerate(self.parts)
            )
        except KeyError as error:
            msg = f"the row has no column {error.args[0]!r}, which task.prompt uses"
            raise InvalidItemError(msg) from None


def _text(value: Json) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else orjson.dumps(value).decode()


def _literal_json(text: str, at: int, token: str, where: str) -> str:
    line = text.count("\n", 0, at) + 1
    shown = " ".join(token[1:-1].split())
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
    return (
        f"{where}: line {line}: {{{shown}}} is not the name of a column; braces enclose names of "
        f"columns: double those of the text itself: {{{{{shown}}}}}"
    )


def _lone_brace(text: str, at: int, where: str) -> str:
    line = text.count("\n", 0, at) + 1
    return (
        f"{where}: line {line}: unmatched brace near {text[at : at + 20]!r}; "
        "write {column} for a column, {{ and }} for the characters"
    )


_NAME: Final = re.compile(r"(?<!\$)\{([A-Za-z_]\w*)\}")


def split_command(text: str, known: Collection[str]) -> tuple[str, ...]:
    """Split a command line into words, keeping names in braces.

    Args:
        text: The command line.
        known: The names that it may use.

    Raises:
        ConfigurationError: It is empty, a quotation is not closed, or a name is unknown.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigurationError(f"invalid command line: {str(error).lower()}") from None
    if not words:
        raise ConfigurationError("is empty; write the command")
    for name in find_names(words):
        if name not in known:
            valid = ", ".join(f"{{{n}}}" for n in sorted(known))
            raise ConfigurationError(f"unknown name {{{name}}}; known names: {valid}")
    return words


def find_names(words: Sequence[str]) -> set[str]:
    """Return the names in braces."""
    return {name for word in words for name in _NAME.findall(word)}


def fill_names(words: Sequence[str], values: Mapping[str, str]) -> tuple[str, ...]:
    """Return the words with the names in braces replaced."""
    return tuple(_NAME.sub(lambda match: values[match[1]], word) for word in words)
