"""Every block of README and docs is executed, or says why not."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from fanfold.configs.json_schema import make_schema
from fanfold.configs.loader import load_config
from fanfold.configs.site import load_site
from fanfold.graphs.cli.app import app
from fanfold.tests.integration.cli.conftest import Shell

from .blocks import PAGES, Block, Command, read_blocks, write_file

KEYS = {"", "file", "exits", "not run"}
LANGUAGES = {"", "console", "sh", "yaml", "json", "python", "mermaid"}
PARTS = jsonschema_rs.validator_for(
    {key: value for key, value in make_schema().items() if key != "allOf"}
)
EDITOR = "$EDITOR"
MOLECULES = [f"m{number},{'C' * (1 + number % 9)}O" for number in range(30)]
MINE = """\
name: screening
input: {path: molecules.csv, id: mol_id}
task:
  prompt: "Estimate the solubility of {smiles}."
  schema: {type: object, required: [score], properties: {score: {type: number}}}
endpoints: {simulated: {nodes: 2, time_scale: 20}}
reduce: [{op: top_k, field: score, k: 3, show: [smiles]}]
"""
PRICE = "model: {price: {prompt: 0.75, cached_prompt: 0.075, completion: 4.5}}\n"
BEFORE: dict[str, list[str]] = {
    "docs/budgets.md": ["run mine.yaml --out full --limit 5 --quiet"],
    "docs/cost.md": ["run mine.yaml --out full --quiet"],
    "docs/faq.md": ["run mine.yaml --out full --quiet"],
    "docs/results.md": [
        "run mine.yaml --out runs/full --quiet",
        "run mine.yaml --out full --quiet --set model.max_tokens=3",  # truncated answers
        "run mine.yaml --out screening --quiet",
    ],
}
"""Commands that make what the commands of a page need."""

LONG = {page for page in PAGES if page not in ("docs/faq.md", "docs/quickstart.md")}


def mark(page: str) -> Any:
    marks = [pytest.mark.integration, *([pytest.mark.long] if page in LONG else [])]
    return pytest.param(page, marks=marks, id=page)


def parse(command: Command) -> None:
    """Parse a command line of fanfold; an unknown command or option raises."""
    group: Any = app
    words = command.words[1:]
    while hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    with group.make_context(group.name, words):
        pass


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_known_kind(page: str) -> None:
    for block in read_blocks(page):
        assert block.language in LANGUAGES, (page, block.line)
        assert block.key in KEYS, (page, block.line)


@pytest.mark.parametrize("page", PAGES)
def test_settings_and_data_are_valid(page: str, tmp_path: Path) -> None:
    for block in read_blocks(page):
        where = f"{page}:{block.line}"
        if block.language == "yaml":
            data = yaml.safe_load(block.text)
            if "like" in data:
                (tmp_path / "site.yaml").write_text(block.text)
                load_site(str(tmp_path / "site.yaml"))
                continue
            assert [one.message for one in PARTS.iter_errors(data)] == [], where
            if {"task", "endpoints"} <= data.keys() and "schema" not in data["task"]:
                load_config(data, environment={"HF_TOKEN": "t"})
        elif block.language == "json":
            lines = [block.text] if "\n " in block.text else block.text.splitlines()
            assert all(json.loads(line) for line in lines), where


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_with_their_options(page: str) -> None:
    for block in read_blocks(page):
        for command in block.commands:
            if command.words[:1] == ["fanfold"] and "…" not in command.words:
                parse(command)


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_its_imports_exist(page: str) -> None:
    for block in read_blocks(page):
        if block.language == "python":
            tree = ast.parse(block.text)
            found = [one for one in tree.body if isinstance(one, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module([*found], []), page, "exec"), {})


def run_python(block: Block) -> None:
    """Execute a block, which may await."""
    code = compile(block.text, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, Any] = {"__name__": "block"}
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, names))
    else:
        exec(code, names)


def run_command(shell: Shell, block: Block, command: Command) -> str:
    """Run a command of fanfold in this process; return what it printed, in one line."""
    words = command.words[1:]
    if words[:2] == ["run", "quickstart"] and "--limit" not in words:
        words = [*words, "--limit", "40"]
    said = shell(*words)
    expected = int(block.value) if block.key == "exits" else 5 if "--pilot" in words else 0
    if "--yes" in words:
        expected = 0
    assert said.code == expected, (block.line, words, said.err, said.out)
    if command.target is not None:
        Path(command.target).write_text(said.out)
    return " ".join((said.out + said.err).split())


@pytest.mark.parametrize("page", [mark(page) for page in PAGES])
def test_blocks_run(page: str, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = shell.folder
    lines = ["mol_id,id,smiles,text", *(f"{line.split(',')[0]},{line},one" for line in MOLECULES)]
    (folder / "molecules.csv").write_text("\n".join(lines) + "\n")
    mine = MINE + (PRICE if page == "docs/budgets.md" else "")
    (folder / "mine.yaml").write_text(mine)
    (folder / "labelled.csv").write_text("id,text,label\na,stopped,anomaly\nb,read 3,other\n")
    (folder / "papers-folder").mkdir()
    (folder / "papers-folder" / "one.txt").write_text("We measured it.")
    for line in BEFORE.get(page, []):
        assert shell(*line.split()).code in (0, 3)
    for block in read_blocks(page):
        if block.key == "not run":
            assert len(block.value) > 10, (page, block.line)
            continue
        if block.key == "file":
            write_file(folder, block)
        elif block.language == "python":
            run_python(block)
        for command in block.commands:
            if command.words[0] == EDITOR:
                Path(command.words[1]).write_text(mine)
                continue
            if command.words[1:3] == ["presets", "copy"]:
                Path(command.words[-1]).unlink()
            assert command.words[0] == "fanfold", (page, block.line, command.words)
            printed = run_command(shell, block, command)
            if block.key == "exits":
                for shown in block.printed:
                    text = " ".join(re.split(r"\s*…", shown)[0].split())
                    assert text in printed, (page, block.line, printed)
