"""Console output: messages on standard error, results on standard output.

Texts from models, servers and files may contain control characters for a terminal. Only this
module escapes them: consoles, log lines and JSON on a terminal go through it. Data that goes to a
pipe or a file is unchanged.
"""

from __future__ import annotations

import io
import logging
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import IO, Any, Final

import orjson

from ...backends.core.terminal import count_nouns, escape_controls, escape_json
from ...backends.core.values import name_values, to_json_text


def print_messages(lines: Iterable[str]) -> None:
    """Print messages to standard error, without markup."""
    if sys.stderr.isatty():
        from .rich_console import (  # noqa: PLC0415 - rich takes 0.1 s
            open_message_console,
            print_message,
        )

        console = open_message_console()
        for line in lines:
            print_message(console, line)
    else:
        sys.stderr.writelines(f"{escape_controls(line)}\n" for line in lines)
        sys.stderr.flush()


def print_lines(lines: Iterable[str]) -> None:
    """Print the result of a command as text lines; those of a terminal end between words."""
    if sys.stdout.isatty():
        from .rich_console import Terminal, print_line  # noqa: PLC0415 - rich takes 0.1 s

        console = Terminal()
        for line in lines:
            print_line(console, line)
    else:  # unchanged, with its tabs
        sys.stdout.writelines(f"{escape_controls(line)}\n" for line in lines)


def print_json(data: Any) -> None:
    """Print the result of a command as one JSON object on one line."""
    text = orjson.dumps(data).decode()
    sys.stdout.write((escape_json(text) if sys.stdout.isatty() else text) + "\n")
    sys.stdout.flush()


def open_data_stream(json: bool) -> IO[bytes]:
    """Return standard output for data: unchanged for a pipe or a file, escaped for a terminal.

    Args:
        json: The data is JSON; use JSON escapes.
    """
    if not sys.stdout.isatty():
        return sys.stdout.buffer
    return _EscapingStream(sys.stdout.buffer, escape_json if json else escape_controls)


class _EscapingStream(io.BytesIO):
    """A stream of whole lines, escaped for a terminal."""

    def __init__(self, stream: IO[bytes], escape: Callable[[str], str]) -> None:
        super().__init__()
        self._stream, self._escape = stream, escape
        self.name = "the output stream"

    def write(self, data: Any) -> int:
        """Write UTF-8 text."""
        text = self._escape(bytes(data).decode(errors="surrogateescape"))
        self._stream.write(text.encode(errors="surrogateescape"))
        return len(data)

    def flush(self) -> None:
        """Flush the underlying stream."""
        self._stream.flush()


def print_traceback(error: BaseException) -> None:
    """Print the traceback of an unexpected error, without control characters."""
    sys.stderr.write(escape_controls("".join(traceback.format_exception(error))))


class _LogHandler(logging.Handler):
    """Writes log lines to the present standard error: while progress is shown, above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one log line."""
        try:
            line = self.format(record)
            if sys.stderr.isatty() and not _shows_progress():
                print_messages([line])
            else:  # rich wraps what is written while it shows progress
                sys.stderr.write(f"{line}\n")
                sys.stderr.flush()
        except Exception:  # noqa: BLE001 - as the handlers of the standard library do
            self.handleError(record)


def _shows_progress() -> bool:
    proxy = sys.modules.get("rich.file_proxy")
    return proxy is not None and isinstance(sys.stderr, proxy.FileProxy)


_PACKAGE: Final = (__package__ or "").partition(".")[0]


class _Formatter(logging.Formatter):
    """Shows level and message, and before a message of another package its name."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - overridden
        """Return the line without the traceback."""
        package = record.name.partition(".")[0]
        source = "" if package == _PACKAGE else f"{package}: "
        return f"{record.levelname}: {source}{record.message}"

    def format(self, record: logging.LogRecord) -> str:
        """Return the line and its traceback, without control characters."""
        return escape_controls(super().format(record))


def setup_logging(level: int, always: Collection[str]) -> None:
    """Show the log on standard error.

    Engines lower the levels of their own loggers (Dask to INFO, Parsl to DEBUG for its log file),
    so the handler filters by level.

    Args:
        level: The lowest level to show.
        always: Names of loggers that are shown from INFO on.
    """
    shown = _LogHandler()
    shown.addFilter(lambda record: record.levelno >= level or record.name in always)
    shown.setFormatter(_Formatter())
    logging.basicConfig(level=level, handlers=[shown])
    for name in always:
        logging.getLogger(name).setLevel(logging.INFO)


_WHOLE: Final = 10_000
"""Smaller numbers are shown without a unit."""


def format_count(number: float) -> str:
    """Return a number in at most five characters, with a unit if large: ``143k``, ``1.2M``."""
    if round(number) < _WHOLE:
        return f"{number:,.0f}"
    scaled, units = number / 1000, "kMGT"
    while round(scaled) >= 1000 and len(units) > 1:  # noqa: PLR2004 - the next unit
        scaled, units = scaled / 1000, units[1:]
    digits = 1 if scaled < 9.95 else 0  # noqa: PLR2004 - 9.95 is 10 when rounded
    return f"{scaled:.{digits}f}{units[0]}"


BLANK: Final = "  "


def fill_lines(parts: Sequence[str], width: int) -> list[str]:
    """Return lines of whole parts; only a part that is wider than the terminal exceeds it."""
    lines = list[str]()
    for part in parts:
        if lines and len(lines[-1]) + len(BLANK) + len(part) <= width:
            lines[-1] += f"{BLANK}{part}"
        else:
            lines.append(part)
    return lines


def name_aggregate_values(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an entry of the aggregate in which texts do not look like other groups and values.

    The text ``1`` beside the number 1 is quoted.
    """
    if "group_by" in entry and isinstance(entry.get("groups"), list):
        groups = _name_texts(entry["groups"], "group")
        rows = [row for one in groups for row in one.get("counts") or ()]
        named = iter(_name_texts(rows, "value"))
        shown = [
            {**one, "counts": list(islice(named, len(one["counts"])))} if "counts" in one else one
            for one in groups
        ]
        return {**entry, "groups": shown}
    if entry.get("op") == "histogram" and isinstance(entry.get("counts"), list):
        return {**entry, "counts": _name_texts(entry["counts"], "value")}
    return entry


def _name_texts(rows: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """Return rows whose texts below a key differ from other values, as texts."""
    values = {to_json_text(row[key]): row[key] for row in rows}
    names = dict(zip(values, name_values(values.values()), strict=True))
    return [
        {**row, key: names[to_json_text(row[key])]} if isinstance(row[key], str) else row
        for row in rows
    ]


def describe_other_groups(entry: Mapping[str, Any]) -> str:
    """Return what an aggregator by groups does not show, in words; empty if it shows all."""
    items, groups = entry.get("others"), entry.get("other_groups")
    if not items:
        return ""
    if groups is not None:
        return f"{count_nouns(items, 'item')} in {count_nouns(groups, 'smaller group')} not shown"
    return (
        f"{count_nouns(items, 'item')} in groups not shown; there are too many values to know the "
        "largest groups: these are the largest of the first ones (numbers before texts, rising)"
    )
