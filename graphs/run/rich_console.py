"""Consoles of rich: text that wraps and tables, with control characters escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from ...backends.core.terminal import escape_controls


class Terminal(Console):
    """A console without markup, emoji codes and control characters.

    Args:
        stderr: Write to standard error.
        file: Write to this file instead.
    """

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, file=file, highlight=not stderr, markup=False, emoji=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the segments of a renderable, with control characters escaped."""
        for part in super().render(renderable, options):
            text = part.text if part.control else escape_controls(part.text)
            yield part if text == part.text else Segment(text, part.style)


def open_message_console() -> Console:
    """Return a console on standard error, for everything but the results of commands."""
    return Terminal(stderr=True)


_COMMAND: Final = re.compile(r": (?=fanfold \S+ )")
"""Where a message ends and a command begins."""


def print_message(console: Console, line: str) -> None:
    """Print a message; a terminal's lines end between words.

    A command that does not fit is printed below its message and is not broken, so that it can be
    copied.

    Args:
        console: The console.
        line: The message, without markup.
    """
    text = escape_controls(line)
    if not console.is_terminal or len(text) <= console.width:
        console.print(Text(text), soft_wrap=True)
        return
    words, *commands = _COMMAND.split(text, maxsplit=1)
    console.print(Text(f"{words}:" if commands else words))
    for command in commands:
        console.print(Text(f"  {command}"), soft_wrap=True)


def print_line(console: Console, line: str, style: str = "") -> None:
    """Print a line; a terminal's lines end between words, and go on at the line's indentation."""
    text = escape_controls(line)
    indent = " " * (len(text) - len(text.lstrip(" ")))
    if not console.is_terminal:  # unchanged, with its tabs
        console.file.write(f"{text}\n")
    elif cell_len(text) <= console.width or len(indent) > console.width // 2:
        console.print(Text(text, style), soft_wrap=True)
    else:
        for part in Text(text.strip(" ")).wrap(console, console.width - len(indent)):
            console.print(Text(f"{indent}{part.plain.rstrip()}", style), soft_wrap=True)
