"""What commands import: the packages of an engine take seconds, and few commands need one."""

from __future__ import annotations

import json
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
    ["resume", "r"],
    ["cancel", "r"],
]
PLAIN = [["--help"], ["presets", "list"], ["cancel", "r"]]
"""Commands that print plain lines."""

RESULTS = [
    ["results", "r"],
    ["results", "r", "-o", "r.csv"],
]
CHECKERS = [
    ["check", "c.yaml"],
    ["endpoints", "c.yaml"],
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
    assert run_commands(PLAIN, ENGINES | {"pydantic", "rich"}).splitlines()[-1] == "[]"
    heavy = ENGINES | {"pyarrow", "aiohttp", "numpy", "tiktoken", "pydantic"}
    *said, found = run_commands(READERS, heavy).splitlines()
    assert found == "[]"
    assert any("map-reduce" in line.casefold() for line in said)
    assert said[-1] == "['cancel', 'r'] r: no job of this run was ever submitted"
    *said, found = run_commands(RESULTS, ENGINES | {"aiohttp", "pydantic"}).splitlines()
    assert found == "[]"
    assert sum('"status":"done"' in line for line in said) == 3
    *said, found = run_commands(CHECKERS, ENGINES).splitlines()
    assert found == "[]"


def test_runs_do_not_import_pandas(shell: Shell) -> None:
    """Arrow imports it for many conversions; it takes 40 MB."""
    commands = [["run", "c.yaml", "--out", "r", "--pilot", "2"], ["resume", "r"]]
    said, found = run_commands(commands, {"pandas"}).rstrip().rsplit("\n", 1)
    assert "top_k of score" in said
    assert found == "[]"
    tables = ("results.parquet", "endpoints.parquet", "timeline.arrow", "items.arrow")
    assert all((shell.folder / "r" / name).exists() for name in tables)


def test_nothing_is_collected_at_the_end() -> None:
    code = """if True:
        import atexit, gc
        atexit.register(lambda: print(gc.get_freeze_count() > 0))
        from fanfold.graphs.cli.app import main
        main()
    """
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "True"


def sessions(shell: Shell) -> int:
    return len(json.loads((shell.folder / "r" / "provenance.json").read_text())["sessions"])


@pytest.mark.parametrize(("faults", "code"), [([], 0), ([{"kind": "refusal"}], 3)])
def test_a_finished_run_is_resumed_from_its_folder_alone(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, faults: list[dict[str, str]], code: int
) -> None:
    fleet = {"nodes": 1, "time_scale": 50, "faults": faults}
    monkeypatch.setenv("TOPIC", "birds")
    shell.write(
        endpoints={"simulated": fleet}, task=shell.config["task"] | {"prompt": "${TOPIC}: {text}"}
    )
    first = shell("run", "c.yaml", "--out", "r", "--json")
    assert first.code == code, first.err
    monkeypatch.delenv("TOPIC")
    files = shell.files()
    again = shell("resume", "r", "--json")
    assert again.code == code, again.err
    before, after = json.loads(first.out), json.loads(again.out)
    assert after.pop("seconds") < before.pop("seconds")
    assert after == before
    assert shell.files() == files
    assert sessions(shell) == 1
    assert "${TOPIC}" in shell("resume", "r", "--retry-failed").err  # a session needs the value


@pytest.mark.parametrize("change", ["results", "aggregate", "settings", "journal", "option"])
def test_a_finished_run_that_was_changed_is_resumed_by_a_session(shell: Shell, change: str) -> None:
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    folder, options = shell.folder / "r", list[str]()
    match change:
        case "results":
            (folder / "results.parquet").unlink()
        case "aggregate":
            (folder / "aggregate.json").write_text("{}")
        case "settings":
            text = (folder / "run.yaml").read_text()
            (folder / "run.yaml").write_text(text.replace("k: 3", "k: 1"))
        case "journal":
            path = folder / "journal" / "0001.jsonl"
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
        case "option":
            options = ["--set", "reduce=[{op: count}]"]
    said = shell("resume", "r", "--json", *options)
    assert said.code == 0, said.err
    assert sessions(shell) == 2
    found = json.loads(said.out)
    assert (found["done"], found["items"]) == (3, 3)
    assert (folder / "results.parquet").exists()
    (entry,) = found["aggregate"]
    rows = 1 if change == "settings" else 3
    assert entry["op"] == "count" if change == "option" else len(entry["rows"]) == rows


def test_a_finished_run_with_a_damaged_journal_is_not_taken_for_finished(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    path = shell.folder / "r" / "journal" / "0001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"status":"done"', b'"status":"gone"', 1))
    said = shell("resume", "r")
    assert said.code == 1
    assert "the checksum does not match" in said.err
