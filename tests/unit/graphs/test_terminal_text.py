"""Text of a model, a server or a file never controls the terminal."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from fanfold.backends.core.terminal import CONTROLS, escape_controls, escape_json
from fanfold.graphs.cli.tables import format_cell, show_aggregate
from fanfold.graphs.run.console import (
    open_data_stream,
    print_json,
    print_lines,
    print_messages,
    print_traceback,
    setup_logging,
)
from fanfold.graphs.run.rich_console import Terminal, print_line

EVIL = [
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "good\rbad",
    "\x7f\x08\x08",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "\u200f\u061c",
    "half \ud800 of one",
    "\x00\x0b\x0c",
    "a\u2028b",
]


@given(st.text(st.characters(codec=None)))
def test_no_control_is_left(text: str) -> None:
    shown = escape_controls(text)
    assert not CONTROLS.search(shown)
    for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0xD800, 0xD810)):
        if chr(code) not in "\t\n\r":
            assert chr(code) not in shown
    assert "\r" not in shown.replace("\r\n", "")
    assert escape_controls(shown) == shown


@given(st.text())
def test_json_keeps_its_value(text: str) -> None:
    shown = escape_json(json.dumps(text, ensure_ascii=False))
    assert json.loads(shown) == text
    assert not CONTROLS.search(shown)


def test_what_it_looks_like() -> None:
    assert escape_controls("\x1b[31m\u202e\x85\ud800") == r"\x1b[31m\u202e\x85\ud800"
    assert escape_controls("naïve 你好 🙂\tx\r\ny\n") == "naïve 你好 🙂\tx\r\ny\n"


@pytest.mark.parametrize("text", EVIL)
def test_all_that_is_said(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_messages([f"Error: {text}"])
    print_lines([text])
    try:
        raise ValueError(text)
    except ValueError as error:
        print_traceback(error)
    out, err = capsys.readouterr()
    assert not CONTROLS.search(out + err)
    assert escape_controls(text) in out
    assert f"Error: {escape_controls(text)}" in err
    assert f"ValueError: {escape_controls(text)}" in err


def test_lines_end_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"  A: meta-llama/Llama-3.3-70B-Instruct: {'500 done, ' * 9}0\tfailed"
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    pipe = Terminal(file=io.StringIO())
    print_line(pipe, line)
    assert pipe.file.getvalue() == f"{line}\n"  # type: ignore[attr-defined]
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen = Terminal(file=io.StringIO())
    screen.width = 40
    print_line(screen, line)
    found = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(found) > 2
    assert all(part.startswith("  ") and len(part) <= 40 for part in found)
    assert " ".join(found).split() == line.split()


@pytest.mark.parametrize("text", EVIL)
def test_consoles(text: str) -> None:
    file = io.StringIO()
    console = Terminal(file=file)
    table = Table(text, title=text)
    table.add_row(text)
    table.add_row(format_cell(text))
    for shown in (text, Text(text, style="bold"), table):
        console.print(shown)
    stage = {"op": "count", "field": text, text: text, "of": {text: 1}}
    show_aggregate([stage], True, console)
    assert not CONTROLS.search(file.getvalue())


def test_markup_of_others_is_text() -> None:
    file = io.StringIO()
    console = Terminal(file=file)
    console.print("[red]r[/red] :smile: [link=http://e]l[/link]")
    table = Table("[b]head")
    table.add_row("[blink]cell[/blink]")
    console.print(table)
    for words in ("[red]r[/red]", ":smile:", "[link=http://e]l[/link]", "[b]head", "[blink]cell"):
        assert words in file.getvalue()


@pytest.mark.parametrize("text", EVIL)
def test_log_lines(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    setup_logging(logging.WARNING, "nobody")
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger("some.one").warning("it says %s", text, exc_info=True)
    err = capsys.readouterr().err
    assert not CONTROLS.search(err)
    assert err.startswith(f"WARNING: some: it says {escape_controls(text)}")
    assert f"ValueError: {escape_controls(text)}" in err


def test_log_lines_name_other_packages_and_no_module_of_fanfold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    setup_logging(logging.WARNING, [])
    logging.getLogger("fanfold.backends.fleet.health").warning("endpoint %s is back", "a:1")
    logging.getLogger("fanfold.backends.fleet.health").info("not shown")
    logging.getLogger("globus_sdk.client").error("no route")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["WARNING: endpoint a:1 is back", "ERROR: globus_sdk: no route"]


class Screen(io.TextIOWrapper):
    """Standard output on a terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        self.kept = io.BytesIO()
        super().__init__(self.kept, encoding="utf-8", write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_data_for_a_pipe_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(terminal=False)
    monkeypatch.setattr(sys, "stdout", screen)
    print_json({"a": "\x9b\u202e"})
    open_data_stream(json=False).write("\x1b[1m,\u202e\r\n".encode())
    assert screen.kept.getvalue() == '{"a":"\x9b\u202e"}\n\x1b[1m,\u202e\r\n'.encode()


def test_data_on_a_terminal_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(terminal=True)
    monkeypatch.setattr(sys, "stdout", screen)
    print_json({"a": "\x9b\u202e"})
    open_data_stream(json=True).write('{"b":"\u202e\x7f"}\n'.encode())
    open_data_stream(json=False).write("\x1b[1m,\u202e\r\n".encode())
    first, second, third = screen.kept.getvalue().decode().split("\n")[:3]
    assert json.loads(first) == {"a": "\x9b\u202e"}
    assert json.loads(second) == {"b": "\u202e\x7f"}
    assert third == "\\x1b[1m,\\u202e\r"
    assert not CONTROLS.search(first + second)
