"""Journal files that were removed from a run folder, or cut, between two sessions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Said, Served, Shell

pytestmark = pytest.mark.integration

ITEMS = 40


@pytest.fixture
def run(shell: Shell, fleet: Served, tmp_path: Path) -> Shell:
    """Return the shell after a run of two sessions, the first one of at most 15 items."""
    lines = "".join(f"{n},thing {n}\n" for n in range(ITEMS))
    (tmp_path / "in.csv").write_text("id,text\n" + lines)
    shell.write(
        endpoints={"urls": list(fleet.urls)},
        model={"name": "simulated-8b"},
        limits={"hedge": False, "streams": 4},
    )
    assert shell("run", "c.yaml", "--out", "r", "--budget-requests", "15").code == 4
    assert shell("resume", "r", "--budget-requests", "900").code == 0
    return shell


def take_messages(said: Said, caplog: pytest.LogCaptureFixture) -> str:
    """Return what a command printed and logged as an error, on one line."""
    text = " ".join(f"{said.err} {caplog.text}".split())
    caplog.clear()
    return text


def count_done(shell: Shell) -> int:
    done: int = json.loads(shell("status", "r", "--json").out)["done"]
    return done


def test_nothing_is_said_of_a_whole_journal(
    run: Shell, fleet: Served, caplog: pytest.LogCaptureFixture
) -> None:
    before = fleet.requests
    for command in ("status", "resume"):
        assert "missing" not in take_messages(run(command, "r"), caplog)
    assert fleet.requests == before
    assert count_done(run) == ITEMS


@pytest.mark.parametrize("name", ["0001.jsonl", "0002.jsonl"])
def test_a_removed_file_is_named_and_its_items_are_asked_again(
    run: Shell, fleet: Served, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = Path("r/journal", name)
    content = path.read_bytes()
    lost = len(content.splitlines()) - 1  # the first line is the header
    path.unlink()
    wanted = f"{name} is missing: it had {len(content):,} bytes of records. Items whose only record"
    before = fleet.requests
    for command in ("status", "resume"):
        text = take_messages(run(command, "r"), caplog)
        assert wanted in text
        assert f"{lost} of {ITEMS} items are open" in text
    assert fleet.requests == before + lost
    assert count_done(run) == ITEMS
    assert "missing" not in take_messages(run("resume", "r"), caplog)  # it is known now


def test_a_file_that_is_put_back_counts(
    run: Shell, fleet: Served, caplog: pytest.LogCaptureFixture
) -> None:
    path, aside = Path("r/journal/0001.jsonl"), Path("aside.jsonl")
    path.rename(aside)
    assert "is missing" in take_messages(run("status", "r"), caplog)
    aside.rename(path)
    before = fleet.requests
    assert "missing" not in take_messages(run("resume", "r"), caplog)
    assert fleet.requests == before


def test_a_file_that_was_cut_is_named(
    run: Shell, fleet: Served, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path("r/journal/0001.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]))
    before = fleet.requests
    text = take_messages(run("resume", "r"), caplog)
    assert "its last records are missing" in text
    assert f"3 of {ITEMS} items are open" in text
    assert fleet.requests == before + 3
    assert count_done(run) == ITEMS


def test_the_file_of_a_worker_is_named_too(
    shell: Shell, fleet: Served, caplog: pytest.LogCaptureFixture
) -> None:
    shell.write(
        endpoints={"urls": list(fleet.urls)},
        model={"name": "simulated-8b"},
        backend={"kind": "local", "processes": 2},
    )
    assert shell("run", "c.yaml", "--out", "r").code == 0
    paths = sorted(Path("r/journal").glob("0001-*.jsonl"))
    assert paths
    for path in paths:
        path.unlink()
    text = take_messages(shell("resume", "r"), caplog)
    assert all(f"{path.name} is missing" in text for path in paths)
    assert count_done(shell) == 3


def test_a_damaged_list_of_files_says_what_to_do(run: Shell) -> None:
    path = Path("r/journal/extents.json")
    path.write_text("{")
    said = run("resume", "r")
    assert said.code == 1
    assert "damaged" in said.err
    assert "remove it" in " ".join(said.err.split())
    path.unlink()
    assert run("resume", "r").code == 0
    assert path.exists()
