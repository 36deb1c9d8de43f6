"""Run folders with other spellings, moved or copied: the same items, each requested once."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from asyncio.subprocess import STDOUT
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.storage.run_folder import RunFolder, open_folder
from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.support.command_server import DEADLINE_S, Command, get_command_server

from .test_postgres_saver import server

__all__ = ["server"]

pytestmark = pytest.mark.integration

PROCESSES: dict[str, Any] = {"kind": "local", "processes": 1}
PARSL: dict[str, Any] = {"kind": "parsl", "workers": 1, "silence_s": 20}
LAUNCHED: dict[str, Any] = {"kind": "launched", "workers": 2}
ELSEWHERE = [
    pytest.param(PROCESSES, id="processes"),
    pytest.param(PARSL, id="parsl"),
    pytest.param(LAUNCHED, id="launched", marks=pytest.mark.long),
]


@pytest.fixture
def lab_of(lab_of: LabMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return labs whose folder is the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(items: int = 120) -> Any:
        return lab_of(items=items)

    return make


async def drained(lab: Lab, at: int = 40, **options: Any) -> None:
    """Begin a run and interrupt it: what is in flight ends, so each item is asked once."""
    lab.config["limits"]["hedge"] = False
    await interrupted(lab, await lab.begin(Path("run")), at, **options)


async def interrupted(lab: Lab, folder: RunFolder, at: int, **options: Any) -> None:
    session = asyncio.create_task(lab.live(folder, **options))
    await lab.until(lambda: session.done() or lab.journal_lines() >= at)
    assert not session.done(), session
    signal.raise_signal(signal.SIGINT)
    assert (await asyncio.wait_for(session, DEADLINE_S)).exit_code == 5
    assert lab.journal_lines() < lab.items
    lab.life_ended()


def asked(lab: Lab) -> int:
    return int(lab.fleet.stats()["totals"]["requests"])


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return each file's bytes and time of change."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def assert_whole(lab: Lab, aggregate: Any) -> None:
    """Assert that each item was asked exactly once, and has one row."""
    lab.assert_whole(aggregate, again=0)
    assert asked(lab) == lab.items


def ids(folder: Path) -> tuple[str, list[str]]:
    about = open_folder(folder).read_provenance()
    return about["run"], about["earlier"]


def assert_no_path(folder: Path, *others: Path | str) -> None:
    """Assert that no file below the folder tells where it lies, or where it lay."""
    paths = {str(folder), str(folder.absolute()), str(folder.resolve()), *map(str, others)}
    for name, (data, _) in contents(folder).items():
        for path in paths:
            if "/" in path:
                assert path.encode() not in data, f"{name} holds {path}"


async def command(cwd: Path, *arguments: str | Path) -> tuple[int, str]:
    """Run the command line in a process of its own, in a working directory of its own."""
    command = Command(tuple(map(str, arguments)), cwd=str(cwd))
    process = await get_command_server().start(command, stderr=STDOUT)
    async with asyncio.timeout(DEADLINE_S):
        said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


SPELLINGS: dict[str, Callable[[Path], str]] = {
    "absolute": lambda home: str(home / "run"),
    "dotted": lambda home: f"{home}/./run/../run/",
    "symlink": lambda home: str(home / "link"),
    "symlinked parent": lambda home: str(home / "parent" / "run"),
    "relative": lambda _: "../run",
}


async def test_all_spellings_are_the_same_run(
    lab_of: LabMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun as ``run``, gone on with from another working directory under other names."""
    async with lab_of(items=400) as lab:
        aggregate = await lab.undisturbed()
        await drained(lab, 20)
        before = ids(Path("run"))
        (tmp_path / "link").symlink_to("run")
        (tmp_path / "parent").symlink_to(tmp_path)
        (tmp_path / "deeper").mkdir()
        monkeypatch.chdir(tmp_path / "deeper")
        for count, spelling in enumerate(SPELLINGS.values(), 1):
            await interrupted(lab, open_folder(Path(spelling(tmp_path))), 20 + 25 * count)
        assert (await lab.live(open_folder(Path("..", "run")))).exit_code == 0
        assert_whole(lab, aggregate)
        assert ids(tmp_path / "run") == before
        assert_no_path(tmp_path / "run", tmp_path / "link", tmp_path / "parent" / "run", "../run")


async def test_two_spellings_have_one_lock(lab_of: LabMaker, tmp_path: Path) -> None:
    async with lab_of() as lab:
        await drained(lab)
        (tmp_path / "link").symlink_to("run")
        with open_folder(Path("link")).lock():
            for spelling in ("run", str(tmp_path / "run"), "./link/../run/"):
                with pytest.raises(ConfigurationError, match="is working on this run"):
                    await lab.live(open_folder(Path(spelling)))
        assert (await lab.live(open_folder(Path("run")))).exit_code == 0


async def test_a_moved_run_goes_on(lab_of: LabMaker, tmp_path: Path) -> None:
    """By the command line, from another directory; the old place stays empty."""
    async with lab_of() as lab:
        aggregate = await lab.undisturbed()
        await drained(lab)
        run = ids(Path("run"))
        target = tmp_path / "elsewhere" / "renamed"
        target.parent.mkdir()
        (tmp_path / "run").rename(target)
        code, said = await command(target.parent, "resume", "renamed")
        assert code == 0, said
        assert not (tmp_path / "run").exists()
        assert ids(target) == run
        target.rename(tmp_path / "run")
        assert_whole(lab, aggregate)
        assert_no_path(tmp_path / "run", target, tmp_path / "run")


async def test_a_copy_is_a_run_of_its_own(lab_of: LabMaker, tmp_path: Path) -> None:
    """The copy asks what is open, once, and leaves the original as it is; that goes on, too."""
    async with lab_of() as lab:
        await drained(lab)
        original, copy, done = tmp_path / "run", tmp_path / "copy", asked(lab)
        shutil.copytree(original, copy, symlinks=True)
        before = contents(original)
        code, said = await command(tmp_path, "resume", "copy", "--json")
        assert code == 0, said
        assert "copy: copied from the folder of run" in " ".join(said.split())
        assert contents(original) == before
        assert asked(lab) == 120
        (run, none), (other, earlier) = ids(original), ids(copy)
        assert none == []
        assert earlier == [run] != [other]
        assert_no_path(copy, original)
        result = await lab.live(open_folder(Path("run")))
        assert (result.exit_code, asked(lab)) == (0, 120 + 120 - done)
        assert ids(original) == (run, [])
        found = [json.loads((f / "aggregate.json").read_bytes()) for f in (original, copy)]
        assert found[0]["aggregate"] == found[1]["aggregate"]
        assert [one["run"] for one in found] == [run, other]


@pytest.mark.parametrize("backend", ELSEWHERE)
async def test_with_workers_elsewhere(
    lab_of: LabMaker, tmp_path: Path, backend: dict[str, Any]
) -> None:
    """Each task names the folder: that of the copy, and the new one after a move."""
    async with lab_of() as lab:
        lab.config["backend"] = backend
        await drained(lab)
        done = asked(lab)
        shutil.copytree("run", "copy")
        Path("run").rename("moved")
        before = contents(Path("moved"))
        copied = await lab.live(open_folder(Path("copy")))
        assert (copied.exit_code, asked(lab)) == (0, 120)
        assert contents(Path("moved")) == before
        moved = await lab.live(open_folder(Path("moved")))
        assert (moved.exit_code, asked(lab)) == (0, 120 + 120 - done)
        assert moved.aggregate == copied.aggregate
        assert ids(Path("copy"))[1] == [ids(Path("moved"))[0]]
        assert not Path("run").exists()
        for folder in (tmp_path / "copy", tmp_path / "moved"):
            assert_no_path(folder, tmp_path / "run")


async def test_copies_of_copies_at_the_same_time(lab_of: LabMaker, tmp_path: Path) -> None:
    """Each is a run of its own, and knows which it comes from; resumed again they stay it."""
    async with lab_of() as lab:
        aggregate = await lab.undisturbed()
        await drained(lab, 30)
        done = asked(lab)
        shutil.copytree("run", "b")
        shutil.copytree("run", "c")
        results = await asyncio.gather(
            command(tmp_path, "resume", "b"), command(tmp_path, "resume", "./c")
        )
        assert [code for code, _ in results] == [0, 0], results
        assert asked(lab) == 120 + 120 - done
        shutil.copytree("b", "d")
        first, b, c = ids(Path("run"))[0], ids(Path("b")), ids(Path("c"))
        assert b[1] == c[1] == [first]
        assert len({first, b[0], c[0]}) == 3
        assert (await lab.live(open_folder(Path("d")))).exit_code == 0
        assert ids(Path("d"))[1] == [b[0], first]
        again = ids(Path("d"))
        assert (await lab.live(open_folder(Path("d")))).aggregate == aggregate
        assert ids(Path("d")) == again
        assert asked(lab) == 120 + 120 - done


@pytest.mark.long
async def test_a_copy_made_while_the_original_works(lab_of: LabMaker, tmp_path: Path) -> None:
    """Signs of workers, checkpoints and lock of the original mean nothing in the copy."""
    async with lab_of() as lab:
        aggregate = await lab.undisturbed()
        lab.config["backend"] = PROCESSES
        lab.config["limits"] |= {"hedge": False, "requests_per_s": 3.0}
        fast = ("limits.requests_per_s=null", "backend={kind: local}")
        session = asyncio.create_task(lab.live(await lab.begin(Path("run"))))
        await lab.until(lambda: session.done() or lab.journal_lines() >= 10)
        shutil.copytree("run", "copy")
        assert list(Path("copy/journal").glob("task-*"))
        options = [part for change in fast for part in ("--set", change)]
        code, said = await command(tmp_path, "resume", "copy", *options)
        assert code == 0, said
        assert not session.done(), "the original works on while the copy is resumed"
        signal.raise_signal(signal.SIGINT)
        assert (await asyncio.wait_for(session, DEADLINE_S)).reason == "SIGINT"
        result = await lab.live(open_folder(Path("run")), overrides=fast)
        assert (result.exit_code, result.progress["done"], result.aggregate) == (0, 120, aggregate)
        found = json.loads(Path("copy/aggregate.json").read_bytes())
        assert found["aggregate"] == aggregate
        book = lab.fleet.stats(prompts=True)["prompts"].values()
        assert max(int(question["asked"]) for question in book) == 2  # once by each run


async def test_reading_commands_leave_a_copy_as_it_is(lab_of: LabMaker, tmp_path: Path) -> None:
    async with lab_of() as lab:
        await drained(lab)
        shutil.copytree("run", "copy")
        before = contents(Path("copy"))
        for name in ("status", "results", "cost"):
            code, said = await command(tmp_path, name, "copy")
            assert code == 0, said
        assert contents(Path("copy")) == before


async def test_a_run_from_another_file_system(lab_of: LabMaker, tmp_path: Path) -> None:
    """A move that copies, as to another file system or by tar: harmless, a new id."""
    async with lab_of() as lab:
        aggregate = await lab.undisturbed()
        await drained(lab)
        run, shared = ids(Path("run"))[0], Path("/dev/shm") / f"fanfold-{os.getpid()}"
        try:
            shutil.move("run", shared)
            assert not Path("run").exists()
            code, said = await command(tmp_path, "resume", shared)
            assert code == 0, said
            assert ids(shared)[1] == [run]
            shutil.move(shared, "run")
        finally:
            shutil.rmtree(shared, ignore_errors=True)
        assert_whole(lab, aggregate)


async def test_a_copy_inherits_what_was_spent(lab_of: LabMaker) -> None:
    """Books and journal of the earlier id count: the budget is not doubled by copying."""
    async with lab_of() as lab:
        lab.config["limits"]["hedge"] = False
        lab.config["budget"] = {"requests": 60}
        result = await lab.live(await lab.begin(Path("run")))
        spent = asked(lab)
        assert (result.exit_code, result.budget["requests"]["spent"]) == (4, spent)
        assert 50 < spent <= 60
        shutil.copytree("run", "copy")
        result = await lab.live(open_folder(Path("copy")))
        assert (result.exit_code, result.budget["requests"]["spent"]) == (4, asked(lab))
        assert asked(lab) <= 60
        copied, more = open_folder(Path("copy")), ("budget.requests=80",)
        result = await lab.live(copied, overrides=more)
        assert (result.exit_code, result.budget["requests"]["spent"]) == (4, asked(lab))
        assert 60 < asked(lab) <= 80
        assert open_folder(Path("run")).read_provenance()["sessions"][-1]["outcome"] != "finished"


async def test_checkpoints_in_postgresql(lab_of: LabMaker, server: str) -> None:
    """The database knows runs by id: a moved one goes on, a copy has a thread of its own."""
    async with lab_of() as lab:
        aggregate = await lab.undisturbed()
        lab.config["shard"] = {"items": 10}
        await drained(lab, checkpointer=server)
        Path("run").rename("moved")
        shutil.copytree("moved", "copy")
        for name in ("moved", "copy"):
            result = await lab.live(open_folder(Path(name)), checkpointer=server)
            assert (result.exit_code, result.aggregate) == (0, aggregate)
        assert ids(Path("moved"))[0] != ids(Path("copy"))[0]
        with psycopg.connect(server) as connection:
            threads = connection.execute("SELECT DISTINCT thread_id FROM checkpoints").fetchall()
            kept = {ids(Path(name))[0] for name in ("moved", "copy")}
            assert kept <= {thread for (thread,) in threads}
            for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes"):
                rows = connection.execute(f"SELECT t::text FROM {table} t".encode()).fetchall()
                text = "\n".join(row for (row,) in rows)
                for path in (Path.cwd(), Path.cwd() / "run", Path.cwd() / "moved"):
                    assert str(path) not in text
                    assert str(path).encode().hex() not in text


async def test_settings_below_the_folder_move_with_it(lab_of: LabMaker, tmp_path: Path) -> None:
    """Paths that lie in the run folder are kept relative to it; others stay where they were."""
    async with lab_of() as lab:
        lab.config["cache"] = str(tmp_path / "run" / ".." / "run" / "kept")
        lab.config["input"]["path"] = os.path.relpath(lab.input)
        await drained(lab)
        text = Path("run/run.yaml").read_text()
        assert "cache: ./kept" in text
        assert str(lab.input) in text
        (tmp_path / "deeper").mkdir()
        Path("run").rename("deeper/run")
        code, said = await command(tmp_path / "deeper" / "run", "resume", ".")
        assert code == 0, said
        assert not Path("run").exists()
        assert sum(1 for _ in Path("deeper/run/kept").rglob("*.jsonl")) == 2
        assert asked(lab) == 120
        lives = open_folder(Path("deeper/run")).read_provenance()["sessions"]
        assert lives[-1]["command"][1:] == ["resume", "DIR"]
        assert_no_path(tmp_path / "deeper" / "run", tmp_path / "run")


async def test_what_a_command_keeps_of_itself(lab_of: LabMaker, tmp_path: Path) -> None:
    async with lab_of(items=5) as lab:
        (tmp_path / "c.yaml").write_text(json.dumps(lab.config))
        out = tmp_path / "deep" / "er" / "run"
        code, said = await command(
            tmp_path,
            *("run", "c.yaml", f"--out={out}", "--set", f"cache={out}/kept", "--json"),
        )
        assert code == 0, said
        (only,) = open_folder(out).read_provenance()["sessions"]
        assert only["command"][1:] == [
            *("run", "c.yaml", "--out=DIR", "--set", "cache=DIR/kept", "--json")
        ]
        assert_no_path(out, "deep/er/run")


async def test_a_folder_of_another_run_at_the_same_place(lab_of: LabMaker) -> None:
    """What comes to lie where a run was is refused by what it asks, as ever."""
    async with lab_of() as lab:
        await drained(lab)
        Path("run").rename("kept")
        lab.config["task"] = lab.config["task"] | {"prompt": "Why {x}?"}
        await lab.live(await lab.begin(Path("run")))
        with pytest.raises(ConfigurationError, match="differ from those of this run"):
            await lab.live(open_folder(Path("kept")), overrides=("task.prompt=Why {x}?",))
