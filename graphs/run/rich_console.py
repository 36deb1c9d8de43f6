"""Consoles of rich: text that wraps and tables, with control characters escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Final

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
