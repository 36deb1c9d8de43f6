"""Prompt templates and command lines with names in braces."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from .errors import ConfigurationError, InvalidItemError
from .fields import split_column
from .types import Json, Message, Row

_MEMBER: Final = re.compile(r"""\s*(["'])[^"']*\1\s*:""")
"""How the text of a JSON object begins, after its brace."""
_PARTS_OF_ONE_NAME: Final = 3
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
        if len(self.parts) == 1:
            return self.parts[0]
        try:
            if len(self.parts) == _PARTS_OF_ONE_NAME:
                before, name, after = self.parts
                return f"{before}{_text(row[name])}{after}"
            return "".join(
                [part if n % 2 == 0 else _text(row[part]) for n, part in enumerate(self.parts)]
            )
        except KeyError:  # a name that is no column: a field inside a column, or missing
            return "".join(
                part if n % 2 == 0 else _text(read_field(row, part, self.where))
                for n, part in enumerate(self.parts)
            )


def read_field(row: Row, name: str, where: str) -> Json:
    """Return the value of a column, or of a field inside a column.

    Args:
        row: The columns.
        name: Name of the column, or of the field.
        where: Key of the setting that names it, for messages.

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


EXAMPLE_OUTPUT: Final = "output"
"""Key of the answer in an example; the other keys are columns."""


@dataclass(frozen=True, slots=True)
class ItemPrompt:
    """The templates of an item's messages, in the order in which they are sent.

    Attributes:
        messages: Role and text of each message; texts that are the same for all items come first.
        constants: Number of messages at the beginning that are the same for all items.
    """

    messages: tuple[tuple[str, Template], ...]
    constants: int = 0

    @classmethod
    def parse(cls, task: Mapping[str, Any], system_role: str = "system") -> ItemPrompt:
        """Parse the section ``task`` of the settings.

        Args:
            task: The section as plain data.
            system_role: Role of the system text; ``user`` puts it before the question, because
                some models refuse two messages of one role in a row.

        Raises:
            ConfigurationError: A template is malformed, or an example lacks a column.
        """
        if given := task.get("messages"):
            asked = [
                (one["role"], Template.parse(one["content"], f"task.messages[{n}].content"))
                for n, one in enumerate(given)
            ]
            split = next((n for n, (role, _) in enumerate(asked) if role != "system"), len(asked))
            head, turns = asked[:split], asked[split:]
        else:
            system: str = task.get("system") or ""
            head = [("system", Template((system,)))] if system else []
            turns = [("user", Template.parse(task["prompt"]))]
        shots = list[tuple[str, Template]]()
        for number, example in enumerate(task.get("examples") or ()):
            try:
                shown = _render_turns(turns, example)
            except InvalidItemError as error:
                msg = f"task.examples[{number}]: {error.message}"
                names = [name for _, text in turns for name in text.columns]
                if any(name.partition(".")[0] == EXAMPLE_OUTPUT for name in names):
                    msg += f"; {EXAMPLE_OUTPUT!r} is the answer of an example: rename that column"
                raise ConfigurationError(msg) from None
            answer = _answer_text(
                example.get(EXAMPLE_OUTPUT), is_json=task.get("schema") is not None
            )
            shots += [*shown, ("assistant", Template((answer,)))]
        messages = _place_system([*head, *shots, *turns], system_role)
        fixed = [len(text.parts) == 1 for _, text in messages[:-1]]
        return cls(tuple(messages), fixed.index(False) if False in fixed else len(fixed))

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names in braces, in order, each once."""
        return tuple(dict.fromkeys(name for _, text in self.messages for name in text.columns))

    def build_messages(self, row: Row) -> list[Message]:
        """Return the messages for one item.

        Raises:
            InvalidItemError: The row lacks a column, or a column has no such field.
        """
        return [{"role": role, "content": text.render(row)} for role, text in self.messages]


def _render_turns(
    turns: Sequence[tuple[str, Template]], example: Mapping[str, Json]
) -> list[tuple[str, Template]]:
    """Return the messages that ask for the answer of an example."""
    row = {name: value for name, value in example.items() if name != EXAMPLE_OUTPUT}
    return [(role, Template((text.render(row),))) for role, text in turns]


def _answer_text(output: Json, *, is_json: bool) -> str:
    """Return the answer of an example as the model should write it."""
    return output if isinstance(output, str) and not is_json else orjson.dumps(output).decode()


def _place_system(
    messages: Sequence[tuple[str, Template]], role: str
) -> list[tuple[str, Template]]:
    """Return the messages with the role of system texts; as ``user``, joined with the next one."""
    if role != "user":
        return [(role if of == "system" else of, text) for of, text in messages]
    placed, waiting = list[tuple[str, Template]](), list[Template]()
    for of, text in messages:
        if of == "system":
            waiting.append(text)
            continue
        if waiting and of != "user":
            placed.append(("user", _join(waiting)))
            waiting = []
        placed.append((of, _join([*waiting, text])))
        waiting = []
    return placed


def _join(texts: Sequence[Template]) -> Template:
    """Return one template with a blank line between the texts."""
    first, *others = texts
    for other in others:
        between = f"{first.parts[-1]}\n\n{other.parts[0]}"
        first = Template((*first.parts[:-1], between, *other.parts[1:]), other.where)
    return first


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
