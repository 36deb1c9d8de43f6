"""``fanfold ls``: the runs in a folder, whole, broken, running and killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fanfold.graphs.cli import runs
from fanfold.tests.support.command_server import BlockingProcess, Command, started

from .conftest import Shell

pytestmark = pytest.mark.integration


def listed(shell: Shell, *folder: str) -> dict[str, Any]:
    said = shell("ls", *folder, "--json")
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


@pytest.fixture
def some_runs(shell: Shell) -> Shell:
    """Three runs in a folder ``runs``: finished, with failures, and out of its budget."""
    assert shell("run", "c.yaml", "--out", "runs/first", "--quiet").code == 0
    faulty = {"nodes": 1, "time_scale": 50, "faults": [{"kind": "refusal", "draw": "item"}]}
    shell.write(endpoints={"simulated": faulty})
    assert shell("run", "c.yaml", "--out", "runs/second", "--quiet").code == 3
    shell.write(name="dear", model={"price": {"prompt": 5.0, "completion": 5.0}})
    budget = ("--budget-requests", "1")
    assert shell("run", "c.yaml", "--out", "runs/third", "--quiet", *budget).code == 4
    (shell.folder / "runs" / "empty").mkdir()
    (shell.folder / "runs" / "notes.txt").write_text("none of them")
    return shell


def test_the_latest_run_comes_first(some_runs: Shell) -> None:
    found = listed(some_runs, "runs")
    assert found["damaged"] == {}
    third, second, first = found["runs"]
    assert [third["folder"], second["folder"], first["folder"]] == [
        "runs/third",
        "runs/second",
        "runs/first",
    ]
    assert (first["state"], first["items"], first["done"], first["failed"]) == ("finished", 3, 3, 0)
    assert (second["done"], second["failed"]) == (0, 3)
    assert third["state"].startswith("the budget is exhausted")
    assert (third["name"], third["done"] < 3, third["failed"]) == ("dear", True, 0)
    assert all(run["simulated"] and run["model"] == "simulated-8b" for run in found["runs"])
    for run in found["runs"]:
        status = json.loads(some_runs("status", run["folder"], "--json").out)
        assert status["state"] == run["state"]
        assert (status["done"], status["failed"]) == (run["done"], run["failed"])
        assert status["usd"] == run["usd"]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table(some_runs: Shell, width: int) -> None:
    some_runs.patch.setenv("COLUMNS", str(width))
    said = some_runs("ls", "runs")
    head, third, second, first, *rest = said.out.splitlines()
    assert head.split()[:4] == ["run", "state", "items", "failed"]
    assert third.startswith("runs/third   the budget is ex")
    assert re.search(r" [012]/3 ", third)
    assert second.split()[:4] == ["runs/second", "finished", "3", "3"]
    assert first.split()[:4] == ["runs/first", "finished", "3", "0"]
    assert all(len(line) <= width for line in said.out.splitlines())
    assert ("dear" in said.out) != (bool(rest) and "name" in rest[0])
    assert width == 140 or rest[0].startswith("columns not shown: ")


def test_a_run_folder_itself_and_the_working_directory(some_runs: Shell) -> None:
    assert [run["folder"] for run in listed(some_runs, "runs/first")["runs"]] == ["runs/first"]
    some_runs.patch.chdir("runs")
    assert {run["folder"] for run in listed(some_runs)["runs"]} == {"first", "second", "third"}
    some_runs.patch.chdir("..")


def test_nothing_there(shell: Shell) -> None:
    (shell.folder / "none").mkdir()
    said = shell("ls", "none")
    assert (said.code, said.out) == (0, "")
    assert "none: no run folder, and none directly in it" in said.err
    said = shell("ls", "nowhere")
    assert said.code == 2
    assert "nowhere: cannot be listed: No such file or directory" in said.err
    assert shell("ls", "c.yaml").code == 2


DAMAGE: dict[str, Any] = {
    "no JSON": b"{",
    "no object": b"[]",
    "another version": b'{"v": 1}',
    "nothing in it": None,
    "odd sessions": {"sessions": 5},
    "odd session": {"sessions": [{"outcome": 7, "done": "x", "failed": -1, "ended": []}, 3]},
    "odd input": {"input": []},
    "odd items": {"input": {"items": "many"}},
    "odd run": {"run": {"a": 1}, "earlier": 5},
}


def test_broken_folders_are_named_and_the_others_listed(some_runs: Shell) -> None:
    home = some_runs.folder / "runs"
    good = json.loads((home / "first" / "provenance.json").read_bytes())
    for name, change in DAMAGE.items():
        shutil.copytree(home / "first", home / name)
        if isinstance(change, bytes):
            (home / name / "provenance.json").write_bytes(change)
        else:
            given = good | change if change is not None else {"v": good["v"]}
            (home / name / "provenance.json").write_text(json.dumps(given))
    shutil.copytree(home / "first", home / "no items")
    (home / "no items" / "items.arrow").unlink()
    shutil.copytree(home / "first", home / "bad journal")
    (journal,) = (home / "bad journal" / "journal").glob("*.jsonl")
    journal.write_bytes(b"nonsense\n" + journal.read_bytes())
    killed = good | {"sessions": [{**good["sessions"][0], "done": None, "outcome": None}]}
    (home / "bad journal" / "provenance.json").write_text(json.dumps(killed))

    found = listed(some_runs, "runs")
    names = {Path(name).name for name in found["damaged"]}
    assert names >= DAMAGE.keys() - {"odd session", "odd run"} | {"no items", "bad journal"}
    assert {"first", "second", "third"} <= {Path(run["folder"]).name for run in found["runs"]}
    said = some_runs("ls", "runs")
    assert said.code == 0
    assert "Traceback" not in said.err
    lines = " ".join(said.err.split())
    assert all(f"not listed: runs/{name}" in lines for name in names)


def test_a_killed_run_is_counted_from_its_journal_or_if_large_by_its_last_note(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"{n},text\n" for n in range(3_000))
    (shell.folder / "in.csv").write_text("id,text\n" + rows)
    shell.write(endpoints={"simulated": {"nodes": 1, "time_scale": 1}}, limits={"streams": 4})
    with started(Command(("run", "c.yaml", "--out", "run", "--quiet"))) as run:
        found = wait_for_an_item(shell, run)
        assert found["state"] == "running"
        assert found["noted"] is None
        run.wait_until((shell.folder / "run" / "counts.json").exists)
    (killed,) = listed(shell)["runs"]
    status = json.loads(shell("status", "run", "--json").out)
    assert (killed["state"], killed["done"]) == ("killed; resumable", status["done"])
    assert 0 < killed["done"] < 3_000

    monkeypatch.setattr(runs, "_MOST_READ", 10)
    (noted,) = listed(shell)["runs"]
    assert 0 < noted["done"] <= killed["done"]
    assert (noted["failed"], noted["noted"] > noted["date"]) == (0, True)
    said = shell("ls")
    assert f"~{noted['done']:,}/3,000" in said.out
    assert "~: as noted every 10 seconds; 'fanfold status DIR' reads the journal" in said.err

    (shell.folder / "run" / "counts.json").write_text("{}")
    assert "counts.json: cannot be read: 'v'; remove it" in " ".join(shell("ls").err.split())
    (shell.folder / "run" / "counts.json").unlink()
    (large,) = listed(shell)["runs"]
    assert (large["done"], large["failed"], large["usd"], large["items"]) == (
        None,
        None,
        None,
        3_000,
    )
    said = shell("ls")
    assert "?/3,000" in said.out
    assert "'fanfold status DIR' reads the journal" in said.err


def wait_for_an_item(shell: Shell, run: BlockingProcess) -> dict[str, Any]:
    def find() -> list[dict[str, Any]]:
        return [found for found in listed(shell)["runs"] if found["done"]]

    return run.wait_until(find)[0]


def test_the_journal_of_an_ended_run_is_not_read(some_runs: Shell) -> None:
    for file in (some_runs.folder / "runs").glob("*/journal/*.jsonl"):
        file.write_bytes(b"no record of anything\n")
    found = listed(some_runs, "runs")
    assert [run["done"] for run in found["runs"]][1:] == [0, 3]
    assert found["damaged"] == {}


@pytest.mark.usefixtures("some_runs")
def test_it_imports_no_engine() -> None:
    code = (
        "import sys; from pathlib import Path; from fanfold.graphs.cli.runs import list_runs; "
        "list_runs(Path('runs'), False); "
        "print({'langgraph', 'langchain_core', 'openai', 'pyarrow'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "runs/first" in done.stdout


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read(some_runs: Shell) -> None:
    locked = some_runs.folder / "runs" / "first"
    locked.chmod(0)
    try:
        assert len(listed(some_runs, "runs")["runs"]) == 2
    finally:
        locked.chmod(0o755)


def test_a_killed_pipeline_is_counted_from_what_its_ended_levels_noted(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [
        {"name": "say", "map": {"prompt": "Say {text}"}},
        {"name": "best", "reduce": {"op": "rank", "prompt": "Best?", "text": "{text}", "k": 2}},
    ]
    shell.write(task=None, reduce=None, stages=stages)
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    file = shell.folder / "run" / "provenance.json"
    about = json.loads(file.read_text())
    (session,) = about["sessions"]
    killed = {key: session[key] for key in ("started", "pid", "host")} | {"outcome": None}
    file.write_text(json.dumps(about | {"sessions": [killed]}))
    monkeypatch.setattr(runs, "_MOST_READ", 10)
    (found,) = listed(shell)["runs"]
    assert (found["state"], found["done"], found["failed"]) == ("killed; resumable", 3, 0)
