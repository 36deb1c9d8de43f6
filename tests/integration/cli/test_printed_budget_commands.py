"""The budget commands of the README and of docs/budgets.md work as they are printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from .conftest import Served, Shell

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
LINE = re.compile(r"^\$ (fanfold .*)$", re.MULTILINE)
CELL = re.compile(r"^\|.*`(fanfold [^`]*)`", re.MULTILINE)


def read_commands(page: str, *patterns: re.Pattern[str]) -> list[list[str]]:
    """Return the commands of a page in their order, without comments."""
    text = (ROOT / page).read_text()
    if page == "README.md":
        text = text[text.index("## Your own data and model") :]
    found = sorted((m.start(), m[1]) for pattern in patterns for m in pattern.finditer(text))
    return [shlex.split(command, comments=True)[1:] for _, command in found]


def edit(shell: Shell, fleet: Served, price: bool) -> None:
    """Fill in mine.yaml: molecules and endpoints of one's own, and a price if wanted."""
    lines = (f"m{n},{'C' * (1 + n % 9)}O" for n in range(60))
    (shell.folder / "molecules.csv").write_text("mol_id,smiles\n" + "\n".join(lines) + "\n")
    config = yaml.safe_load(Path("mine.yaml").read_text())
    config["endpoints"] = {"urls": [*fleet.urls]}
    config["input"] = {"path": "molecules.csv", "id": "mol_id"}
    if price:
        config["model"]["price"] = {"prompt": 0.75, "cached_prompt": 0.075, "completion": 4.5}
    Path("mine.yaml").write_text(yaml.safe_dump(config))


CODES = {"run": 5}
"""A pilot without a terminal to ask on ends with 5, every other command with 0."""


def test_the_readmes_commands(shell: Shell, fleet: Served) -> None:
    commands = read_commands("README.md", LINE)
    names = [command[0] for command in commands]
    earlier = ["presets", "check", "run", "failures", "resume"]
    assert names == [*earlier, "results", "report", "run"]
    asked = 0
    for command in commands:
        said = shell(*command)
        is_extension = "--from" in command  # of unchanged settings: it asks nothing
        code = 0 if is_extension else CODES.get(command[0], 0)
        assert said.code == code, (command, said.err)
        assert not is_extension or fleet.requests == asked
        asked = fleet.requests
        if command[0] == "presets":
            edit(shell, fleet, price=False)
    assert len(Path("results.csv").read_text().splitlines()) == 61


def test_the_commands_of_the_page_on_budgets(shell: Shell, fleet: Served) -> None:
    assert shell("presets", "copy", "quickstart", "mine.yaml").code == 0
    edit(shell, fleet, price=True)
    commands = read_commands("docs/budgets.md", LINE, CELL)
    assert {command[0] for command in commands} == {"check", "run", "resume", "cost"}
    assert sum("--budget-usd" in command for command in commands) >= 2
    assert shell("run", "mine.yaml", "--pilot", "5", "--out", "full").code == 5
    for command in commands:
        said = shell(*("full" if word == "DIR" else word for word in command))
        assert said.code == CODES.get(command[0], 0), (command, said.err)
        if "budget.usd=20" in command:
            assert "budget: covers all items" in said.out


def test_a_budget_in_dollars_without_a_price_is_explained(shell: Shell, fleet: Served) -> None:
    """The printed command with servers of one's own, which have no listed price."""
    assert shell("presets", "copy", "quickstart", "mine.yaml").code == 0
    edit(shell, fleet, price=False)
    said = shell("check", "mine.yaml", "--set", "budget.usd=20")
    assert said.code == 2
    assert "prompt tokens: " in said.out
    assert "Add model.price" in said.err
