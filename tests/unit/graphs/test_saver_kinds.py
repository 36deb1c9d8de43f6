from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from langgraph.checkpoint.base import empty_checkpoint

from fanfold.backends.core.errors import ConfigurationError, JournalError
from fanfold.graphs.run import checkpoints as savers
from fanfold.graphs.run.checkpoints import check_saver, is_network, open_saver

MOUNTS = r"""
22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw
23 22 0:20 / /proc rw - proc proc rw
30 22 0:31 / /scratch rw,flock shared:9 - lustre 10.0.0.1@tcp:/work rw
31 22 0:32 / /home rw - nfs4 server:/home rw
32 31 254:2 / /home/me/local\040disk rw - xfs /dev/vdb rw
33 22 0:33 / /my\040nfs rw - nfs server:/x rw
34 22 0:34 / /gpfs/alpine rw - gpfs alpine rw
35 22 0:35 / /dual rw - nfs server:/dual rw
36 22 0:36 / /dual rw - tmpfs tmpfs rw
37 22 0:37 / /mnt/ssh rw - fuse.sshfs me@host: rw
38 22 0:38 / /mnt/image rw - fuse.fuse-overlayfs fuse-overlayfs rw
39 22 0:39 / /back\134slash rw - beegfs x rw
a broken line
"""

CONFIG: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}


@pytest.mark.parametrize(
    ("path", "network"),
    [
        ("/", False),
        ("/data/run/checkpoints.sqlite", False),
        ("/scratch/me/run/checkpoints.sqlite", True),
        ("/scratch", True),
        ("/scratchpad/run", False),
        ("/home/me/run", True),
        ("/home/me/local disk/run", False),
        ("/home/me/local", True),
        ("/my nfs/run", True),
        ("/gpfs/alpine/p/run", True),
        ("/gpfs/other", False),
        ("/dual/run", False),
        ("/mnt/ssh/run", True),
        ("/mnt/image/run", False),
        ("/back\\slash/run", True),
    ],
)
def test_network_file_systems_are_told_by_the_mount_table(path: str, network: bool) -> None:
    assert is_network(Path(path), MOUNTS) is network


def test_no_mount_table_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savers, "_MOUNTS", tmp_path / "none")
    assert not is_network(tmp_path)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/scratch")
    assert is_network(tmp_path / "link" / "run", MOUNTS)


async def put(file: Path) -> str:
    """Write a checkpoint, and return the journal mode that it was written in."""
    async with open_saver(None, file) as saver:
        await saver.aput(CONFIG, empty_checkpoint(), {}, {})
        connection = saver.conn  # type: ignore[attr-defined]  # of the SQLite saver
        async with connection.execute("PRAGMA journal_mode") as cursor:
            return str((await cursor.fetchone())[0])


async def count(file: Path) -> int:
    async with open_saver(None, file) as saver:
        return len([entry async for entry in saver.alist(CONFIG)])


async def test_the_journal_follows_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "checkpoints.sqlite"
    assert await put(file) == "wal"
    monkeypatch.setattr(savers, "is_network", lambda _: True)
    assert await put(file) == "delete"  # a folder may have been moved
    assert await count(file) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints.sqlite"]
    monkeypatch.undo()
    assert await put(file) == "wal"
    assert await count(file) == 3


async def test_no_shared_memory_on_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In exclusive mode SQLite makes no -shm file, not even before WAL is left."""
    monkeypatch.setattr(savers, "is_network", lambda _: True)
    seen = set[str]()
    execute = aiosqlite.Connection.execute

    async def watching(self: aiosqlite.Connection, sql: str, *rest: Any) -> Any:
        seen.update(p.name for p in tmp_path.iterdir())
        return await execute(self, sql, *rest)

    monkeypatch.setattr(aiosqlite.Connection, "execute", watching)
    async with open_saver(None, tmp_path / "checkpoints.sqlite"):
        seen.update(p.name for p in tmp_path.iterdir())
    assert seen
    assert not any(name.endswith("-shm") for name in seen)


async def test_a_damaged_file_is_told_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints.sqlite"
    file.write_bytes(b"no database" * 100)
    with pytest.raises(JournalError, match=r"not a database .*delete it"):
        await count(file)


async def test_an_error_while_it_is_used_is_told(tmp_path: Path) -> None:
    async def fail() -> None:
        async with open_saver(None, tmp_path / "checkpoints.sqlite"):
            raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(JournalError, match="cannot be written or read: database or disk is full"):
        await fail()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://me:hush@host/db", "found mysql"),
        ("host/db?password=hush", "found no scheme"),
        ("postgresql://me:hush", "not a valid URL|cannot be reached"),
        ("postgresql://me:hu@sh@host/db", "not a valid URL.*%40"),
        ("postgresql://me:hush/@host/db", "not a valid URL"),
        ("postgresql://me:hush@[::1/db", "not a valid URL"),
        ("postgresql://", "not a valid URL"),
    ],
)
async def test_a_wrong_url_is_refused_without_its_secrets(url: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        await check_saver(url)
    assert "hush" not in caught.value.message


async def test_sqlite_needs_no_look() -> None:
    await check_saver(None)
