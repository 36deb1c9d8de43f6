"""What a person sees: real commands in a terminal of 60, 80 and 140 columns."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from fanfold.tests.support.command_server import Command, started

from .conftest import Shell

pytestmark = pytest.mark.integration

_STEP = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n\x07])|([^\x1b\r\n\x07]+)")


class Screen:
    """What a terminal shows: understands what rich writes; a line may be longer than the screen."""

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0

    def write(self, text: str) -> None:
        for count, final, control, plain in _STEP.findall(text):
            if control == "\r":
                self.column = 0
            elif control == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif final == "A":
                self.row = max(0, self.row - int(count or 1))
            elif final == "K":
                self.lines[self.row] = "" if count == "2" else self.lines[self.row][: self.column]
            elif plain:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = (
                    line[: self.column] + plain + line[self.column + len(plain) :]
                )
                self.column += len(plain)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).rstrip()


def see(width: int, *arguments: str) -> tuple[Screen, list[str], int]:
    """Run a command in a terminal; return the screen at the end, all frames, and the exit code."""
    own, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    screen, frames = Screen(), list[str]()
    decoder = codecs.getincrementaldecoder("utf-8")()
    command = Command(arguments, env=environment)
    with started(command, stdin=its, stdout=its, stderr=its) as run:
        os.close(its)
        while data := read_terminal(own):
            screen.write(decoder.decode(data))
            frames.append(screen.text)
        code = run.wait(60)
    os.close(own)
    return screen, frames, code


def read_terminal(handle: int) -> bytes:
    try:
        return os.read(handle, 1 << 16)
    except OSError:  # the command has closed its terminal
        return b""


WORDS = "a sentence of usual words that goes on for longer than any line of a terminal"


@pytest.fixture
def faulty(shell: Shell) -> Shell:
    """A run of some seconds: refusals, and a server that dies."""
    rows = "".join(f"molecule-{n},{WORDS} {n}\n" for n in range(150))
    (shell.folder / "in.csv").write_text("id,text\n" + rows)
    faults = [
        {"kind": "refusal", "p": 0.1, "draw": "item"},
        {"kind": "die_at", "nodes": [0], "value": 0.5},
    ]
    shell.write(
        endpoints={"simulated": {"nodes": 3, "time_scale": 1, "faults": faults}},
        limits={"streams": 12},
        model={"price": {"prompt": 1000.0, "completion": 1000.0}},
        budget={"usd": 1000},
        reduce=[{"op": "top_k", "field": "score", "k": 3, "show": ["text"]}],
    )
    return shell


@pytest.mark.parametrize("width", [60, 80, pytest.param(140, marks=pytest.mark.long)])
@pytest.mark.usefixtures("faulty")
def test_a_run(width: int) -> None:
    screen, frames, code = see(width, "run", "c.yaml", "--out", "run", "--no-report")
    text = screen.text
    assert code == 3, text
    during = [frame for frame in frames if re.search(r" [1-9]\d? %  \d+/150", frame)]
    assert during, "a bar between 1 and 99 per cent"
    for part in (r"\d/s", r"\d+:\d\d left", "in flight", r"[\d.]+/1,000 USD"):
        assert re.search(part, during[-1]), part
    assert re.search(r"failed:  \d+ RefusedAnswerError", text)
    lines = text.splitlines()
    (bar,) = (n for n, line in enumerate(lines) if "100 %  150/150" in line)
    warning = next(n for n, line in enumerate(lines) if "WARNING" in line)
    assert warning < bar, text
    assert "marked unhealthy" in " ".join(" ".join(lines[warning:bar]).split())
    assert text.count("%  ") == 1, "the bar is drawn in one place"
    assert_whole(text, width)
    assert "molecule-" in text


@pytest.mark.parametrize(
    "width", [60, *(pytest.param(n, marks=pytest.mark.long) for n in (80, 140))]
)
@pytest.mark.usefixtures("faulty")
def test_commands_that_look_at_a_run(shell: Shell, width: int) -> None:
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 3
    for command in (
        ["status", "run"],
        ["status", "run", "--endpoints"],
        ["failures", "run"],
        ["show", "run"],
        ["show", "run", "--failed"],
        ["cost", "run"],
        ["cost", "run", "--by", "endpoint"],
        ["ls"],
        ["ls", "run"],
    ):
        screen, _, code = see(width, *command)
        assert code == 0, command
        assert_whole(screen.text, width)
        if "endpoint" in command[-1]:
            assert re.search(r"127\.0\.0\.1:\d+/node-2\b", screen.text), screen.text
    failures = see(width, "failures", "run")[0].text
    assert f"Say {WORDS}" in " ".join(failures.split())


@pytest.mark.parametrize("width", [60, 80])
def test_long_messages_break_between_words(shell: Shell, width: int) -> None:
    shell.write(task={"prompt": "Say {textt}", "schema": {"type": "object"}}, reduce=[])
    screen, _, code = see(width, "run", "c.yaml", "--no-report")
    assert code == 2
    assert_whole(screen.text, width)


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.usefixtures("shell")
def test_a_printed_command_can_be_copied(width: int) -> None:
    """A command that does not fit has a line of its own, without line ends of ours."""
    folder = "a-folder-with-a-long-name/" * 4 + "run"
    screen, _, code = see(
        width, "run", "c.yaml", "--out", folder, "--budget-requests", "1", "--no-report"
    )
    assert code == 4
    commands = [line for line in screen.text.splitlines() if line.strip().startswith("fanfold")]
    assert commands == [f"  fanfold resume {folder} --budget-requests N"]


def test_standard_output_elsewhere_gets_only_the_result(shell: Shell, tmp_path: Path) -> None:
    own, its = pty.openpty()
    command = Command(("run", "c.yaml", "--out", "run", "--json"))
    with (
        (tmp_path / "out").open("wb") as out,
        started(command, stdin=its, stdout=out.fileno(), stderr=its) as run,
    ):
        os.close(its)
        while read_terminal(own):
            pass
        assert run.wait(60) == 0
    os.close(own)
    assert (tmp_path / "out").read_bytes().startswith(b'{"run":"')
    assert shell("status", "run", "--json").code == 0


def assert_whole(text: str, width: int) -> None:
    """Check that no line is longer than the terminal, except commands, which are copied whole."""
    lines = [line for line in text.splitlines() if not line.startswith("  fanfold ")]
    long = [line for line in lines if len(line) > width]
    assert not long, f"{width} columns:\n" + "\n".join(long)


def test_a_run_writes_its_report_at_the_end(shell: Shell) -> None:
    screen, _, code = see(100, "run", "c.yaml", "--out", "run")
    assert code == 0
    assert "Report: run/report.html (" in screen.text
    report = shell.folder / "run" / "report.html"
    assert report.stat().st_size > 50_000
    report.unlink()
    report.mkdir()  # so that it cannot be written
    screen, _, code = see(200, "resume", "run")
    assert code == 0
    assert "WARNING: no report was written (" in screen.text
    assert "write it with: fanfold report run" in screen.text
    report.rmdir()
    for option in ("--no-report", "--json"):
        assert see(100, "resume", "run", option)[2] == 0
    assert not report.exists()


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_no_exit_code(closed: str, tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m fanfold"
    for folder, code in (("missing", 2), (".", 0)):
        shown = subprocess.run(
            ["sh", "-c", f"{command} ls {folder} {closed}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (shown.returncode, "Traceback" in shown.stderr) == (code, False)
