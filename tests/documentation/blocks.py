"""The code blocks of the pages, with the comments that say how a test treats them.

A comment on the line before a block says one of

- ``<!-- file: NAME -->``: the block is the content of this file;
- ``<!-- exits: N -->``: its command ends with this exit code, and prints the lines below it;
- ``<!-- not run: REASON -->``: why no test executes the block; commands are still parsed.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Final

from .reference import PAGES as WRITTEN
from .reference import ROOT

_BLOCK: Final = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<key>[a-z ]+): (?P<value>.*?) -->\n *)?"
    r"```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
PAGES: Final = [
    name
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (name := page.relative_to(ROOT).as_posix()) not in WRITTEN
]
"""The pages that people write."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line of a block.

    Attributes:
        words: The words, without comment, redirection and what a pipe leads to.
        target: File that standard output goes to, or None.
    """

    words: list[str]
    target: str | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A code block.

    Attributes:
        line: Its first line on the page.
        language: The word after the fence.
        text: The content.
        key: What the comment before it is about, or empty.
        value: What the comment says.
    """

    line: int
    language: str
    text: str
    key: str = ""
    value: str = ""

    @property
    def commands(self) -> list[Command]:
        """Return the command lines, if it has any."""
        prompt = "" if self.language == "sh" else r"\$ "
        if self.language not in ("console", "sh", ""):
            return []
        joined = self.text.replace("\\\n", " ")
        return [_split(line) for line in re.findall(rf"^{prompt}(\S.*)$", joined, re.MULTILINE)]

    @property
    def printed(self) -> list[str]:
        """Return the lines that are not commands."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in joined.splitlines() if line and not line.startswith("$ ")]


def _split(line: str) -> Command:
    words = shlex.split(line, comments=True)
    target = None
    if "|" in words:
        words = words[: words.index("|")]
    if ">" in words:
        place = words.index(">")
        target, words = words[place + 1], words[:place]
    return Command(words, target)


def read_blocks(page: str) -> list[Block]:
    """Return the code blocks of a page in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            text.count("\n", 0, found.start()) + 1,
            found["language"],
            dedent(found["text"]),
            found["key"] or "",
            found["value"] or "",
        )
        for found in _BLOCK.finditer(text)
    ]


def write_file(folder: Path, block: Block) -> None:
    """Write the file that a block is."""
    (folder / block.value).write_text(block.text, encoding="utf-8")
