"""Prompt templates and command lines with names in braces."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from .errors import ConfigurationError, InvalidItemError
from .fields import split_column
from .types import Json, Row

_MEMBER: Final = re.compile(r"""\s*(["'])[^"']*\1\s*:""")
"""How the text of a JSON object begins, after its brace."""
_SHOWN: Final = 40
_TOKEN: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed prompt.

    Attributes:
        parts: Alternates literal text (even) and names in braces (odd): of a column, or of a field
            inside a column that contains objects, as ``output.score``.
        where: Key of the setting, for messages.
    """

    parts: tuple[str, ...]
    where: str = "task.prompt"

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
        return cls((*parts, literal + text[at:]), where)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names in braces, in order, each once."""
        return tuple(dict.fromkeys(self.parts[1::2]))

    def render(self, row: Row) -> str:
        """Fill in one row; a value that is not text becomes compact JSON, None becomes empty text.

        Raises:
            InvalidItemError: The row lacks a column, or a column has no such field.
        """
        try:
            return "".join(
                part if n % 2 == 0 else _text(row[part]) for n, part in enumerate(self.parts)
            )
        except KeyError:  # a name that is no column: a field inside a column, or missing
            return "".join(
                part if n % 2 == 0 else _text(_read_value(row, part, self.where))
                for n, part in enumerate(self.parts)
            )


def _read_value(row: Row, name: str, where: str) -> Json:
    """Return the value of a column, or of a field inside a column.

    Raises:
        InvalidItemError: The row has no such column or field.
    """
    found = split_column(name, row)
    if found is None:
        raise InvalidItemError(f"the row has no column {name!r}, which {where} uses")
    column, keys = found
    value = row[column]
    for depth, key in enumerate(keys):
        at = ".".join((column, *keys[:depth]))
        if type(value) is not dict:
            kind = _KINDS.get(type(value), "a number")
            hint = f"; {_NOT_PARSED}" if type(value) is str else ""
            msg = f"{where} uses {{{name}}}, but {at!r} is {kind}, not an object{hint}"
            raise InvalidItemError(msg)
        if key not in value:
            raise InvalidItemError(f"{where} uses {{{name}}}, but {at!r} has no field {key!r}")
        value = value[key]
    return value


_KINDS: Final = {type(None): "null", str: "text", list: "a list", bool: "a boolean"}
_NOT_PARSED: Final = "text is not parsed as JSON: give the input as JSON lines or Parquet"


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
