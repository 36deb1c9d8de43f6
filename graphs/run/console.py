"""How commands speak: messages on standard error, results on standard output.

What models, servers and files say may hold characters that a terminal acts upon. Here, and nowhere
else, they are spelled out: consoles, log lines and JSON on a terminal go through this module. What
goes to a pipe or a file as data is unchanged.
"""

from __future__ import annotations

import io
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import orjson
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ...backends.core.terminal import escape_controls, escape_json


class Terminal(Console):
    """A console that shows text as it is: no markup, no emoji codes, no control characters.

    Args:
        stderr: Whether it writes to standard error.
        file: Where it writes instead.
    """

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, file=file, highlight=not stderr, markup=False, emoji=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the parts of something that is printed."""
        for part in super().render(renderable, options):
            text = part.text if part.control else escape_controls(part.text)
            yield part if text == part.text else Segment(text, part.style)


def open_message_console() -> Console:
    """Return the console for everything that is not a command's result."""
    return Terminal(stderr=True)


def print_messages(lines: Iterable[str]) -> None:
    """Print messages as they are, without markup."""
    console = open_message_console()
    for line in lines:
        console.print(escape_controls(line), soft_wrap=True)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines of a command's result that people read."""
    for line in lines:
        sys.stdout.write(f"{escape_controls(line)}\n")


def print_json(data: Any) -> None:
    """Print a command's result as one JSON object on one line."""
    text = orjson.dumps(data).decode()
    sys.stdout.write((escape_json(text) if sys.stdout.isatty() else text) + "\n")
    sys.stdout.flush()


def open_data_stream(json: bool) -> IO[bytes]:
    """Return standard output for data: as it is for a pipe or a file, escaped for a terminal.

    Args:
        json: Whether the data is JSON, whose own escapes are used then.
    """
    if not sys.stdout.isatty():
        return sys.stdout.buffer
    return _EscapingStream(sys.stdout.buffer, escape_json if json else escape_controls)


class _EscapingStream(io.BytesIO):
    """A stream of whole lines that a terminal shows."""

    def __init__(self, stream: IO[bytes], escape: Callable[[str], str]) -> None:
        super().__init__()
        self._stream, self._escape = stream, escape
        self.name = "the output stream"

    def write(self, data: Any) -> int:
        """Write bytes of UTF-8 text."""
        text = self._escape(bytes(data).decode(errors="surrogateescape"))
        self._stream.write(text.encode(errors="surrogateescape"))
        return len(data)

    def flush(self) -> None:
        """Hand everything on."""
        self._stream.flush()


def print_traceback(error: BaseException) -> None:
    """Print an error that nobody foresaw, as Python does, without control characters."""
    sys.stderr.write(escape_controls("".join(traceback.format_exception(error))))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


def setup_logging(level: int, always: str) -> None:
    """Show the log on standard error.

    Engines lower the levels of their own loggers (Dask to INFO, Parsl to DEBUG for its log file),
    so what is shown is decided here.

    Args:
        level: The least level that is shown.
        always: Name of a log that is shown whatever its level.
    """
    shown = logging.StreamHandler()
    shown.addFilter(lambda record: record.levelno >= level or record.name == always)
    shown.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[shown])
