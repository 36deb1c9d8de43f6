"""``fanfold run NEW --from DIR``: what is kept, what is asked, and that nothing is paid twice."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.core.terminal import count_nouns
from fanfold.tests.support.command_server import Command, run_command, started

from .conftest import SCHEMA, Served, Shell
from .test_cli_terminal import read_terminal

pytestmark = pytest.mark.integration

YES = ("--yes", "--quiet")


def use(shell: Shell, served: Served | None, **sections: Any) -> None:
    """Write settings for the endpoints of a fleet that counts its requests."""
    urls = {} if served is None else {"endpoints": {"urls": list(served.urls)}}
    shell.write(**urls | sections)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of each item, with the name of its file."""
    found = dict[str, dict[str, Any]]()
    for path in sorted((folder / "journal").glob("*.jsonl")):
        for line in path.read_bytes().splitlines()[1:]:
            record = orjson.loads(line)
            found[record["id"]] = record | {"file": path.name}
    return found


def plan_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "provenance.json").read_text())["from"]
    return found


def counts(plan: dict[str, Any]) -> tuple[int, int, int, int]:
    return plan["done"], plan["failed"], plan["asked"], plan["dropped"]


def test_additional_rows(shell: Shell, fleet: Served) -> None:
    """In another order, with a row less: only the new one is asked; the old run may go then."""
    use(shell, fleet, model={"price": {"prompt": 1.0, "completion": 1.0}})
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    before, old = fleet.requests, records(shell.folder / "old")
    files = shell.files()
    (shell.folder / "in.csv").write_text("id,text\n4,four\n3,three\n1,one\n")
    refused = shell("run", "c.yaml", "--from", "old", "--out", "new", "--quiet")
    assert refused.code == 2
    assert "add --yes" in refused.err
    assert not (shell.folder / "new").exists()
    said = shell("run", "c.yaml", "--from", "old", "--out", "new", "--yes", "--json")
    assert said.code == 0
    told = json.loads(said.out)
    assert "kept, at no cost: 2 done" in said.err
    assert "asked: 1 (1 not in that run)" in said.err
    assert "not in this one: 1" in said.err
    assert "dollars: " in said.err
    assert fleet.requests == before + 1
    assert (told["done"], told["requests"], told["reused"]) == (3, 1, 2)
    assert told["kept"] == {"done": 2, "failed": 0}
    new = records(shell.folder / "new")
    for name in ("1", "3"):
        assert new[name]["output"] == old[name]["output"]
        assert new[name]["question"] == old[name]["question"]
        assert new[name]["origin"] == told["from"]
        assert new[name]["nano_usd"] == new[name]["requests"] == 0
    assert [new[name]["index"] for name in ("4", "3", "1")] == [0, 1, 2]
    assert new["4"]["nano_usd"] / 1e9 == pytest.approx(told["usd"])
    changed = {name for name, at in shell.files().items() if files.get(name) not in {None, at}}
    assert changed == {"in.csv"}

    shutil.rmtree(shell.folder / "old")
    assert shell("resume", "new", "--quiet").code == 0
    assert shell("run", "c.yaml", "--from", "old", "--out", "new", "--quiet").code == 0
    assert fleet.requests == before + 1
    rows = [json.loads(line) for line in shell("results", "new").out.splitlines()]
    assert [row["id"] for row in rows] == ["4", "3", "1"]
    assert json.loads(shell("status", "new", "--json").out)["kept"] == told["kept"]


def test_extended_twice(shell: Shell, fleet: Served) -> None:
    """A run that was extended can be extended; answers name the run that asked."""
    use(shell, fleet)
    assert shell("run", "c.yaml", "--out", "one", "--quiet").code == 0
    assert shell("run", "c.yaml", "--from", "one", "--out", "two", "--quiet").code == 0
    before = fleet.requests
    assert shell("run", "c.yaml", "--from", "two", "--out", "three", "--quiet").code == 0
    assert fleet.requests == before
    first = json.loads((shell.folder / "one" / "provenance.json").read_text())["run"]
    assert {one["origin"] for one in records(shell.folder / "three").values()} == {first}
    assert counts(plan_of(shell.folder / "three")) == (3, 0, 0, 0)


@pytest.mark.parametrize(
    "sections",
    [
        {"task": {"prompt": "Judge {text}", "schema": SCHEMA}},
        {"task": {"prompt": "Say {text}", "schema": SCHEMA, "system": "Briefly."}},
        {"task": {"prompt": "Say {text}", "schema": SCHEMA | {"title": "other"}}},
        {"model": {"temperature": 0.5}},
    ],
)
def test_another_question_is_asked(shell: Shell, fleet: Served, sections: dict[str, Any]) -> None:
    use(shell, fleet)
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    before = fleet.requests
    use(shell, fleet, **sections)
    said = shell("run", "c.yaml", "--from", "old", "--out", "new", *YES)
    assert said.code == 0
    assert "asked: 3 (3 with another question)" in said.err
    assert fleet.requests == before + 3


def test_changed_text_of_a_row_is_asked(shell: Shell, fleet: Served) -> None:
    """The same id with another text is another question; a column without use is not."""
    use(shell, fleet)
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    before = fleet.requests
    (shell.folder / "in.csv").write_text("id,text,note\n1,one,a\n2,zwei,b\n3,three,c\n")
    assert shell("run", "c.yaml", "--from", "old", "--out", "new", *YES).code == 0
    assert fleet.requests == before + 1
    assert counts(plan_of(shell.folder / "new")) == (2, 0, 1, 0)


def test_suffixed_duplicates(shell: Shell, fleet: Served) -> None:
    """Repeated ids are items of their own; each is matched by its unique name and its question."""
    given = {"path": "in.csv", "id": "id", "on_duplicate": "suffix"}
    (shell.folder / "in.csv").write_text("id,text\na,one\na,two\nb,three\n")
    use(shell, fleet, input=given)
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    before = fleet.requests
    (shell.folder / "in.csv").write_text("id,text\na,one\na,two\na,one\nb,three\n")
    assert shell("run", "c.yaml", "--from", "old", "--out", "new", *YES).code == 0
    assert fleet.requests == before + 1
    assert counts(plan_of(shell.folder / "new")) == (3, 0, 1, 0)


def cut(max_tokens: int, **more: Any) -> dict[str, Any]:
    """Return settings of free text of 64 to 160 tokens; the model refuses some items."""
    faults = [{"kind": "refusal", "p": 0.4, "draw": "item"}]
    fleet = {"nodes": 1, "time_scale": 50, "faults": faults}
    return {
        "task": {"prompt": "Say {text}"},
        "model": {"max_tokens": max_tokens},
        "endpoints": {"simulated": fleet},
        "reduce": None,
    } | more


def failed_classes(folder: Path) -> dict[str, int]:
    found = dict[str, int]()
    for record in records(folder).values():
        if record["status"] == "failed":
            found[record["error_class"]] = found.get(record["error_class"], 0) + 1
    return found


@pytest.fixture
def truncated(shell: Shell) -> dict[str, int]:
    """A run ``old`` with truncated, refused and good answers; return its failures by class."""
    rows = "".join(f"r{n},{'word ' * (n % 4)}{n}\n" for n in range(60))
    (shell.folder / "in.csv").write_text("id,text\n" + rows)
    shell.write(**cut(100))
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 3
    found = failed_classes(shell.folder / "old")
    assert found["TruncatedAnswerError"] > 0
    assert found["RefusedAnswerError"] > 0
    assert sum(found.values()) <= 60
    return found


def test_larger_max_tokens_asks_truncated_answers(shell: Shell, truncated: dict[str, int]) -> None:
    shell.write(**cut(500))
    said = shell("run", "c.yaml", "--from", "old", "--out", "new", *YES)
    plan = plan_of(shell.folder / "new")
    assert plan["asked"] == truncated["TruncatedAnswerError"]
    found = re.search(r"completion tokens: ([\d,]+) to ([\d,]+), likely ([\d,]+)", said.err)
    assert found is not None, said.err
    low, high, likely = (int(number.replace(",", "")) for number in found.groups())
    tokens = json.loads(shell("status", "new", "--json").out)["tokens"]
    used = tokens["completion"]
    prompts = re.search(r"prompt tokens: .* likely ([\d,]+)", said.err)
    assert prompts is not None
    assert int(prompts[1].replace(",", "")) == pytest.approx(tokens["prompt"], rel=0.05)
    assert 100 * plan["asked"] == low <= used <= high == 500 * plan["asked"]
    assert likely / 1.3 < used < 1.3 * likely
    assert plan["failed"] == truncated["RefusedAnswerError"]
    after = records(shell.folder / "new")
    assert "TruncatedAnswerError" not in failed_classes(shell.folder / "new")
    kept = [one for one in after.values() if one["file"] == "0000.jsonl"]
    assert len(kept) == 60 - plan["asked"]
    assert sum(one["reused"] for one in kept) == plan["done"]


@pytest.mark.parametrize("choice", ["cut", "failed", "all", None])
def test_ask_again(shell: Shell, truncated: dict[str, int], choice: str | None) -> None:
    """Without a change, failed items are kept as failed; the option overrides that."""
    option = () if choice is None else ("--ask-again", choice)
    shell("run", "c.yaml", "--from", "old", "--out", "new", *YES, *option)
    asked = {
        "cut": truncated["TruncatedAnswerError"],
        "failed": sum(truncated.values()),
        "all": 60,
        None: 0,
    }
    assert plan_of(shell.folder / "new")["asked"] == asked[choice]


def test_another_choice_of_what_to_ask_again_needs_another_run(
    shell: Shell, truncated: dict[str, int]
) -> None:
    command = ("run", "c.yaml", "--from", "old", "--out", "new", *YES)
    shell(*command, "--ask-again", "cut")
    refused = shell(*command, "--ask-again", "all")
    assert refused.code == 2
    assert "was begun with --ask-again cut" in refused.err
    for same in (("--ask-again", "cut"), ()):
        assert "finished" in shell("status", "new").out + shell("status", "new").err
        assert shell(*command, *same).code != 2
    assert plan_of(shell.folder / "new")["asked"] == truncated["TruncatedAnswerError"]


def test_changed_limits_ask_failed_items(shell: Shell, truncated: dict[str, int]) -> None:
    shell.write(**cut(100, limits={"request_timeout_s": 99}))
    shell("run", "c.yaml", "--from", "old", "--out", "new", *YES)
    assert plan_of(shell.folder / "new")["asked"] == sum(truncated.values())


def test_kept_failures_can_be_retried(shell: Shell, truncated: dict[str, int]) -> None:
    shell("run", "c.yaml", "--from", "old", "--out", "new", *YES)
    assert counts(plan_of(shell.folder / "new"))[1:] == (sum(truncated.values()), 0, 0)
    shell("resume", "new", "--quiet", "--retry-failed")
    after = records(shell.folder / "new")
    retried = [one for one in after.values() if one["file"] != "0000.jsonl"]
    assert len(retried) == sum(truncated.values())


def test_retried_truncated_answers_point_to_a_higher_limit(
    shell: Shell, truncated: dict[str, int]
) -> None:
    """The same limit truncates them again; the command that is named works as it is printed."""
    failures = shell("failures", "old").out
    command = "fanfold run old/run.yaml --set model.max_tokens=200 --from old --out old-2"
    assert f"TruncatedAnswerError: ask again with a higher limit: {command}\n" in failures
    assert json.loads(shell("status", "old", "--json").out)["next_command"] == command
    retried = shell("resume", "old", "--retry-failed", "--quiet")
    count = truncated["TruncatedAnswerError"]
    assert f"WARNING: {count_nouns(count, 'truncated answer')} will be asked again" in retried.err
    assert retried.err.splitlines()[0].endswith(command)
    said = shell(*command.split()[1:], *YES)
    assert f"asked: {count} " in said.err
    assert "TruncatedAnswerError" not in failed_classes(shell.folder / "old-2")
    assert "WARNING" not in shell("resume", "old-2", "--retry-failed", "--quiet").err


def test_simulated_and_real_never_mix(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    path = shell.folder / "old" / "provenance.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"simulated": False}))
    said = shell("run", "c.yaml", "--from", "old", "--out", "new", *YES)
    assert said.code == 2
    assert "its answers are real, and these endpoints are simulated" in said.err
    assert sorted(p.name for p in shell.folder.iterdir() if p.is_dir()) == ["old"]


def test_refused_sources(shell: Shell) -> None:
    said = shell("run", "c.yaml", "--from", "nowhere", "--out", "new", *YES)
    assert (said.code, "no such run folder" in said.err) == (2, True)
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    said = shell("run", "c.yaml", "--from", "old", "--ask-again", "some", "--out", "new")
    assert (said.code, "cut, failed, all" in said.err) == (2, True)
    said = shell("run", "c.yaml", "--ask-again", "all", "--out", "new")
    assert (said.code, "--from DIR" in said.err) == (2, True)
    said = shell("run", "c.yaml", "--from", "old", "--out", "old", *YES)
    assert (said.code, "does not extend" in said.err) == (2, True)
    path = shell.folder / "old" / "provenance.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"v": 1}))
    said = shell("run", "c.yaml", "--from", "old", "--out", "new", *YES)
    assert (said.code, "format 1" in said.err) == (1, True)
    assert not (shell.folder / "new").exists()


def test_unfinished_run_is_extended(shell: Shell, fleet: Served) -> None:
    """A pilot leaves items open; they are asked in the new run, and the same command goes on."""
    use(shell, fleet)
    assert shell("run", "c.yaml", "--out", "old", "--quiet", "--pilot", "1").code == 5
    before = fleet.requests
    arguments = ("run", "c.yaml", "--from", "old", "--out", "new", *YES)
    said = shell(*arguments)
    assert (said.code, "2 not finished there" in said.err) == (0, True)
    assert fleet.requests == before + 2
    assert shell(*arguments).code == 0
    assert fleet.requests == before + 2


def test_pilot_of_an_extended_run(shell: Shell, fleet: Served) -> None:
    """The pilot asks items that were not taken over, and estimates for those."""
    rows = [f"r{n},text {n}\n" for n in range(40)]
    (shell.folder / "in.csv").write_text("id,text\n" + "".join(rows[:30]))
    use(shell, fleet)
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    before = fleet.requests
    (shell.folder / "in.csv").write_text("id,text\n" + "".join(rows))
    said = shell("run", "c.yaml", "--from", "old", "--out", "new", *YES, "--pilot", "4")
    assert said.code == 0
    assert "pilot: 4 of 10 items" in said.err
    assert "4 requests" in said.err
    assert "estimate for all 10 items" in said.err
    assert fleet.requests == before + 10


def test_running_source_is_refused(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    holder = (
        "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(shell.folder / "old" / "journal" / "lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"held\n"
        said = shell("run", "c.yaml", "--from", "old", "--out", "new", *YES)
        process.stdin.close()
    assert (said.code, "paid twice" in said.err) == (2, True)


KILL = """
import os, signal
from fanfold.backends.storage.journal_writer import JournalWriter
from fanfold.graphs.cli.app import main
write, count = JournalWriter.write, [0]
def deadly(self, record):
    count[0] += 1
    if count[0] == {lines}:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, record)
JournalWriter.write = deadly
main()
"""


@pytest.mark.parametrize("lines", [2, 31])
def test_killed_while_or_after_taking_over(shell: Shell, fleet: Served, lines: int) -> None:
    """Killed in the middle there is no run yet; after it, a resume asks only what is open."""
    rows = [f"r{n},text {n}\n" for n in range(40)]
    (shell.folder / "in.csv").write_text("id,text\n" + "".join(rows[:30]))
    use(shell, fleet, limits={"streams": 1})
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    before = fleet.requests
    (shell.folder / "in.csv").write_text("id,text\n" + "".join(rows))
    arguments = ["run", "c.yaml", "--from", "old", "--out", "new", *YES]
    done = run_command(Command(tuple(arguments), KILL.format(lines=lines)))
    assert done.returncode == -signal.SIGKILL, done.stderr
    is_early = lines <= 30
    assert (shell.folder / "new").exists() is not is_early
    asked = fleet.requests - before
    assert asked == (0 if is_early else 1)
    assert shell(*arguments).code == 0
    assert fleet.requests == before + 10 + asked
    told = json.loads(shell("status", "new", "--json").out)
    assert (told["done"], told["requests"], told["reused"]) == (40, 10, 30)


@pytest.mark.parametrize("answer", [b"y\n", b"n\n", None])
def test_asks_on_a_terminal(shell: Shell, fleet: Served, answer: bytes | None) -> None:
    """Yes begins; no, and Ctrl-C (None), leave nothing behind."""
    use(shell, fleet)
    assert shell("run", "c.yaml", "--out", "old", "--quiet", "--limit", "2").code == 0
    before = fleet.requests
    command = Command(("run", "c.yaml", "--from", "old", "--out", "new", "--quiet"))
    own, its = pty.openpty()
    with started(command, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        said = b""
        while b"[y/N]" not in said:
            more = read_terminal(own)
            assert more, said
            said += more
        assert b"asked: 1" in said
        if answer is None:
            process.send_signal(signal.SIGINT)
        else:
            os.write(own, answer)
        while more := read_terminal(own):
            said += more
        code = process.wait(60)
    os.close(own)
    is_yes = answer == b"y\n"
    assert code == (0 if is_yes else 1), said
    assert fleet.requests == before + is_yes
    assert (shell.folder / "new").exists() is is_yes


def test_fills_an_existing_empty_folder(shell: Shell, fleet: Served) -> None:
    use(shell, fleet)
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    before = fleet.requests
    (shell.folder / "new").mkdir()
    assert shell("run", "c.yaml", "--from", "old", "--out", "new", *YES).code == 0
    assert fleet.requests == before
    assert len(records(shell.folder / "new")) == 3


def test_budget_pays_only_what_is_asked(shell: Shell, fleet: Served) -> None:
    """The limit holds for the new items, and the total to finish does not count the kept ones."""
    rows = [f"r{n},text {n}\n" for n in range(40)]
    (shell.folder / "in.csv").write_text("id,text\n" + "".join(rows[:30]))
    use(shell, fleet, limits={"streams": 1})
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    (shell.folder / "in.csv").write_text("id,text\n" + "".join(rows))
    arguments = ("run", "c.yaml", "--from", "old", "--out", "new", *YES, "--budget-requests")
    assert shell(*arguments, "5").code == 4
    told = json.loads(shell("status", "new", "--json").out)
    assert told["open"] + told["requests"] == 10
    assert 0 < told["requests"] <= 5
    assert told["total_to_finish"]["requests"] == 10


def test_only_what_fits(shell: Shell, fleet: Served) -> None:
    """A second prompt for the items whose answer and input fit; the selection holds on resume."""
    rows = "".join(f"r{n},text {n},{'ab'[n % 2]}\n" for n in range(30))
    (shell.folder / "in.csv").write_text("id,text,kind\n" + rows)
    use(shell, fleet)
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    old = records(shell.folder / "old")
    fit = [f"r{n}" for n in range(30) if old[f"r{n}"]["output"]["score"] > 0.5 and n % 2 == 0]
    assert 0 < len(fit) < 15
    before = fleet.requests
    use(shell, fleet, task={"prompt": "Judge {text}", "schema": SCHEMA})
    only = ("--only", "output.score > 0.5 and kind == a")
    said = shell("run", "c.yaml", "--from", "old", "--out", "new", *YES, *only)
    assert said.code == 0, said.err
    assert f"only items with: {only[1]}" in said.err
    assert fleet.requests == before + len(fit)
    assert sorted(records(shell.folder / "new")) == sorted(fit)
    plan = plan_of(shell.folder / "new")
    assert counts(plan) == (0, 0, len(fit), 30 - len(fit))

    said = shell("run", "c.yaml", "--from", "old", "--out", "new", *YES)
    assert (said.code, "was begun with --only" in said.err) == (2, True)
    os.utime(shell.folder / "in.csv")  # as after a copy: the same rows
    with (shell.folder / "in.csv").open("a") as file:
        file.write("r99,another,a\n")  # not selected
    assert shell("resume", "new", "--quiet").code == 0
    assert fleet.requests == before + len(fit)
    changed = (shell.folder / "in.csv").read_text().replace(f"{fit[0]},text", f"{fit[0]},other")
    (shell.folder / "in.csv").write_text(changed)
    said = shell("resume", "new", "--quiet")
    assert (said.code, "content of" in said.err) == (2, True)


def test_only_failed(shell: Shell, truncated: dict[str, int]) -> None:
    """Failed items are selected to be asked again, also if nothing has changed."""
    arguments = ("run", "c.yaml", "--from", "old", "--out", "new", *YES, "--only", "failed")
    assert shell(*arguments).code == 3
    failed = sum(truncated.values())
    assert counts(plan_of(shell.folder / "new")) == (0, 0, failed, 60 - failed)


def test_only_refused(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    start = ("run", "c.yaml", "--from", "old", "--out", "new", *YES, "--only")
    for only, says in (
        ("failed", "none of the 3 finished items"),
        ("score >", "cannot be read"),
        ("scor > 1", "did you mean 'score'"),
    ):
        said = shell(*start, only)
        assert (said.code, says in said.err) == (2, True), said.err
    said = shell("run", "c.yaml", "--only", "failed", "--out", "new")
    assert (said.code, "needs --from" in said.err) == (2, True)
    assert not (shell.folder / "new").exists()


def test_further_samples(shell: Shell, fleet: Served) -> None:
    """The samples of the other run are kept by their ids; a run with fewer drops the last ones."""
    model = {"temperature": 0.8, "seed": 7}
    schema = SCHEMA | {"required": ["score", "label"]}
    task = shell.config["task"] | {"schema": schema, "samples": 2}
    use(shell, fleet, task=task, model=model)
    assert shell("run", "c.yaml", "--out", "old", "--quiet").code == 0
    old, asked = records(shell.folder / "old"), fleet.requests
    assert sorted(old) == ["1", "1~2", "2", "2~2", "3", "3~2"]
    use(shell, fleet, task=task | {"samples": 3, "fold": "vote"}, model=model)
    assert shell("run", "c.yaml", "--from", "old", "--out", "new", *YES).code == 0
    assert counts(plan_of(shell.folder / "new")) == (6, 0, 3, 0)
    assert fleet.requests == asked + 3
    new = records(shell.folder / "new")
    assert all(new[name]["output"] == record["output"] for name, record in old.items())
    assert {name: record["sample"] for name, record in new.items() if name[0] == "1"} == {
        "1": 0,
        "1~2": 1,
        "1~3": 2,
    }
    use(shell, fleet, task=task | {"samples": 1}, model=model)
    assert shell("run", "c.yaml", "--from", "new", "--out", "one", *YES).code == 0
    assert counts(plan_of(shell.folder / "one")) == (3, 0, 0, 6)
    assert fleet.requests == asked + 3
    folded = {row["id"]: row["output"] for row in rows_of(shell, "new")}
    label = folded["1"]["label"]
    only = f"label == {json.dumps(label)}"
    use(shell, fleet, task=task, model=model | {"seed": 8})
    said = shell("run", "c.yaml", "--from", "new", "--only", only, "--out", "some", *YES)
    assert said.code == 0
    chosen = [name for name, output in folded.items() if output["label"] == label]
    assert counts(plan_of(shell.folder / "some")) == (0, 0, 2 * len(chosen), 9 - 2 * len(chosen))


def rows_of(shell: Shell, folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shell("results", folder).out.splitlines()]


def test_samples_in_results(shell: Shell, fleet: Served) -> None:
    use(shell, fleet)
    assert shell("run", "c.yaml", "--out", "plain", "--quiet").code == 0
    refused = shell("results", "plain", "--samples")
    assert (refused.code, "each row was asked once" in refused.err) == (2, True)
    schema = SCHEMA | {"required": ["score", "label"]}
    use(shell, fleet, task=shell.config["task"] | {"schema": schema, "samples": 3})
    warned = shell("check", "c.yaml")
    assert "at model.temperature 0 the 3 samples of a row are equal" in warned.err
    assert "9 items (3 rows, 3 samples of each)" in warned.out
    assert "requests: 9" in warned.out
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    assert [row["agreement"] for row in rows_of(shell, "r")] == [{"label": 1.0}] * 3
    lines = shell("results", "r", "--samples", "--format", "csv").out.splitlines()
    assert lines[0].startswith("id,status,text,output.label,output.score,row_id,sample,")
    assert len(lines) == 10
    assert [line.partition(",")[0] for line in lines[1:4]] == ["1", "1~2", "1~3"]
    shown = shell("show", "r", "--columns", "agreement.label,samples", "--json").out
    assert json.loads(shown)["rows"][0] == {"id": "1", "agreement.label": 1.0, "samples": 3}
    assert shell("results", "r", "--samples", "-o", "s.parquet").code == 0
    assert json.loads(shell("status", "r", "--json").out)["samples"] == 3
