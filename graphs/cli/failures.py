"""``fanfold failures``: error classes of a run, each with a remedy and an example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import orjson
from rich.console import Console
from rich.text import Text

from ...backends.core.errors import ConfigurationError
from ...backends.core.terminal import count_nouns, escape_controls
from ...backends.storage.journal import Journal
from ...backends.storage.journal_file import ItemCounts
from ...backends.storage.run_folder import RunFolder, get_run_ids, open_folder
from ..run.console import print_json, print_lines, print_messages
from ..run.next_steps import continue_lines
from ..run.rich_console import Terminal, print_message

_SHOWN: Final = 1_000
"""Characters of a text that the terminal shows; ``--json`` has all that is known."""

_INDENT: Final = 2


def show_failures(path: Path, error_class: str | None, as_json: bool) -> None:
    """Show the error classes of a run, or the ids of the items that failed with one of them.

    Raises:
        ConfigurationError: The folder is no run folder, or no item failed with the class.
        JournalError: The journal or the item store is damaged.
    """
    folder = open_folder(path)
    about = folder.read_provenance()
    with Journal(folder.journal, get_run_ids(about), about["input"]["items"]) as journal:
        if error_class is not None:
            _show_ids(journal, error_class, as_json)
            return
        counts = journal.count_items()
        rows = _describe(folder, journal) if counts.failed else []
    if as_json:
        print_json(
            {
                "run": about["run"],
                "simulated": about["simulated"],
                "running": folder.is_in_use(),
                "items": about["input"]["items"],
                "failed": counts.failed,
                "classes": rows,
            }
        )
        return
    _print(folder, about, counts, rows, Terminal())


def _describe(folder: RunFolder, journal: Journal) -> list[dict[str, Any]]:
    """Return the error classes of a run with examples; print what keeps prompts from them."""
    from ...backends.inputs.item_store import ItemStore  # pyarrow is slow to import
    from ..analysis.failures import describe_failures

    with ItemStore(folder.items) as store:
        found = describe_failures(folder, journal, store)
    if found.notice is not None:
        print_messages([found.notice])
    return found.rows


def _show_ids(journal: Journal, error_class: str, as_json: bool) -> None:
    """Print the ids of the items that failed with a class, in input order."""
    ids = (str(journal.read_record(n).get("id")) for n in journal.find_failed(error_class))
    known = journal.count_failures()
    if error_class not in known:
        names = ", ".join(known) or "none: no item has failed"
        msg = f"--class {error_class}: no item failed with it; the classes of this run: {names}"
        raise ConfigurationError(msg)
    if as_json:
        print_json({"class": error_class, "ids": list(ids)})
    else:
        print_lines(" ".join(name.splitlines()) for name in ids)


def _print(
    folder: RunFolder,
    about: Mapping[str, Any],
    counts: ItemCounts,
    rows: list[dict[str, Any]],
    console: Console,
) -> None:
    ended = counts.done + counts.failed
    mark = "SIMULATED: " if about["simulated"] else ""
    still = f"; {counts.open:,} not finished" if counts.open else ""
    head = f"{mark}{counts.failed:,} failed of {count_nouns(ended, 'item')} that ended{still}"
    console.print(Text(head, style="bold"))
    for row in rows:
        console.print()
        console.print(Text(f"{row['count']:,} x {row['class']}", style="bold"))
        _print_block(_class_lines(row), console)
    if not rows:
        return
    console.print()
    for line in continue_lines(folder, [row["class"] for row in rows], folder.is_in_use()):
        print_message(console, f"{line[0].upper()}{line[1:]}")


def _print_block(lines: Iterator[tuple[int, str]], console: Console) -> None:
    """Print lines by their depth, wrapped between words, without blanks at their ends."""
    for depth, line in lines:
        indent = " " * (_INDENT * depth)
        for part in Text(escape_controls(line)).wrap(console, console.width - len(indent)):
            console.print(Text(f"{indent}{part.plain}".rstrip()), soft_wrap=True)


def _class_lines(row: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a class with their depth."""
    example = row["example"]
    yield 1, f"remedy: {row['remedy']}"
    yield 1, f"example: item {example['id']}"
    yield 1, f"error: {_shorten(example['error'])}"
    if example["endpoint"] is not None:
        sent = example["requests"] or 0
        repairs = f", {count_nouns(example['repairs'], 'repair')}" if example["repairs"] else ""
        yield 1, f"endpoint: {example['endpoint']}, {count_nouns(sent, 'request')}{repairs}"
    if example["messages"] is None:
        yield 1, "row of the input (no message of a request is known):"
        yield 2, _shorten(example["row"])
    else:
        for message in example["messages"]:
            yield 1, f"request, {message.get('role')}:"
            yield 2, _shorten(message.get("content"))
    if example["response"] is None:
        yield 1, "response: none was recorded"
    elif not example["response"].strip():
        yield 1, "response: empty"
    else:
        yield 1, "response:"
        yield 2, _shorten(example["response"], example["response_bytes"])


def _shorten(value: Any, size: int | None = None) -> str:
    """Return a text of a server, a model or the input as far as the terminal shows it.

    Args:
        value: The text, or a value that is shown as JSON.
        size: Its whole size in bytes if the journal has only its beginning.
    """
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    if len(text) <= _SHOWN:
        return text
    whole = f"{len(text):,} characters" if size is None else f"{size:,} bytes"
    return f"{text[:_SHOWN]}… ({whole}; --json shows more)"
