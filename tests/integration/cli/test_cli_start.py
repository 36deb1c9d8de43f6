"""What commands import: the packages of an engine take seconds, and few commands need one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .conftest import Shell

pytestmark = pytest.mark.integration

ENGINES = {"langgraph", "langchain_core", "langsmith", "openai"}
READERS = [
    ["--help"],
    ["ls"],
    ["presets", "list"],
    ["status", "r"],
    ["status", "r", "--usage", "--json"],
    ["cost", "r", "--by", "endpoint"],
    ["failures", "r"],
    ["cancel", "r"],
]
CHECKERS = [
    ["check", "c.yaml"],
    ["endpoints", "c.yaml"],
    ["results", "r"],
    ["results", "r", "-o", "r.csv"],
]


def run_commands(commands: list[list[str]], packages: set[str]) -> str:
    """Run commands in one new process; return its output, last which packages it imported."""
    code = f"""if True:
        import sys
        from fanfold.backends.core.errors import FanfoldError
        from fanfold.graphs.cli.app import app
        for words in {commands!r}:
            try:
                app(words, standalone_mode=False)
            except FanfoldError as error:
                print(words, error.message)
        print(sorted({packages!r} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


def test_commands_import_only_what_they_need(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    heavy = ENGINES | {"pyarrow", "aiohttp", "numpy", "tiktoken"}
    *said, found = run_commands(READERS, heavy).splitlines()
    assert found == "[]"
    assert any("map-reduce" in line.casefold() for line in said)
    assert said[-1] == "['cancel', 'r'] r: no job of this run was ever submitted"
    *said, found = run_commands(CHECKERS, ENGINES).splitlines()
    assert found == "[]"
    assert sum('"status":"done"' in line for line in said) == 3
