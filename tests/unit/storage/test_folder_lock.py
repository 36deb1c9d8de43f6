from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fanfold.backends.core.errors import ConfigurationError, JournalError
from fanfold.backends.storage.run_folder import (
    RunFolder,
    create_folder,
    get_folder_identity,
    is_vacant,
    open_folder,
    place_to_be,
    write_bytes,
    write_json,
)

HOLD = """
import sys
from pathlib import Path
from fanfold.backends.storage.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "journal").mkdir()
    return RunFolder(tmp_path)


def test_a_lock_ends_with_its_process_even_by_kill(folder: RunFolder) -> None:
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert folder.is_in_use()
        with pytest.raises(ConfigurationError, match="another process or invocation is working"):
            folder.lock().__enter__()
        holder.kill()
        holder.wait()
    assert not folder.is_in_use()
    with folder.lock():
        assert folder.is_in_use()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_neither_keeps_nor_ends_a_lock(folder: RunFolder) -> None:
    """A pool of processes that somebody else's code starts in the meantime has copies of it."""
    (ends, end), (tells, tell) = os.pipe(), os.pipe()
    lock = folder.lock()
    lock.__enter__()
    child = os.fork()
    if child == 0:  # it unwinds what it has copied, and goes on
        lock.__exit__(None, None, None)
        os.write(tell, b"x")
        os.read(ends, 1)
        os._exit(0)
    try:
        assert os.read(tells, 1) == b"x"
        assert folder.is_in_use()
    finally:
        os.write(end, b"x")
        os.waitpid(child, 0)
        lock.__exit__(None, None, None)
    lock = folder.lock()
    lock.__enter__()
    child = os.fork()
    if child == 0:
        os.read(ends, 1)
        os._exit(0)
    lock.__exit__(None, None, None)
    try:
        assert not folder.is_in_use()
        with folder.lock():
            assert folder.is_in_use()
    finally:
        os.write(end, b"x")
        os.waitpid(child, 0)
        for handle in (ends, end, tells, tell):
            os.close(handle)


def test_looking_keeps_nobody_out(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody looks at the run in the moment in which it is to be locked."""
    with folder.lock():
        pass
    looker = (folder.journal / "lock").open()
    fcntl.flock(looker, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: looker.close())
    with folder.lock():
        assert looker.closed


def test_a_run_nobody_has_opened_is_not_in_use(folder: RunFolder) -> None:
    assert not folder.is_in_use()
    assert list(folder.journal.iterdir()) == []


def test_a_file_system_without_locks_only_warns(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(_: int, __: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), folder.lock():
        assert "no locks on this file system (No locks available)" in caplog.text
    assert not folder.is_in_use()


def test_a_lock_that_cannot_be_opened(folder: RunFolder) -> None:
    (folder.journal / "lock").mkdir()
    with pytest.raises(JournalError, match="lock: cannot be opened: Is a directory"):
        folder.lock().__enter__()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"

    def failing() -> None:
        with create_folder(target) as partial:
            write_json(partial.provenance, {})
            assert not target.exists()
            raise OSError(errno.EIO, "not about the folder")

    with pytest.raises(OSError, match="not about the folder"):
        failing()
    assert list(tmp_path.iterdir()) == []
    with create_folder(target) as partial:
        write_json(partial.provenance, {})
    assert sorted(p.name for p in target.iterdir()) == ["journal", "provenance.json"]
    assert list(target.parent.iterdir()) == [target]


def test_a_place_that_is_taken_meanwhile_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "run"

    def failing() -> None:
        with create_folder(target):
            target.mkdir()
            (target / "mine").touch()

    with pytest.raises(ConfigurationError, match="contains other files; choose another"):
        failing()
    assert [p.name for p in target.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled_not_replaced(tmp_path: Path) -> None:
    """It may be private, striped, a mount point, or where somebody's shell is."""
    target = tmp_path / "run"
    target.mkdir(mode=0o700)
    (target / ".new-of-a-killed-process").mkdir()
    before = target.stat()

    def failing() -> None:
        with create_folder(target) as partial:
            write_json(partial.provenance, {})
            raise OSError(errno.EIO, "not about the folder")

    with pytest.raises(OSError, match="not about the folder"):
        failing()
    assert is_vacant(target)
    tmp_path.chmod(0o500)  # nobody but its owner need be allowed to write beside it
    try:
        with create_folder(target) as partial:
            write_json(partial.provenance, {})
            place = place_to_be(partial)
    finally:
        tmp_path.chmod(0o700)
    assert not is_vacant(target)
    assert RunFolder(target).provenance.exists()
    assert RunFolder(target).journal.is_dir()
    assert (target.stat().st_ino, target.stat().st_mode) == (before.st_ino, before.st_mode)
    assert place == get_folder_identity(target)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("parents", ["", "a/b"])
def test_a_run_that_another_one_makes_meanwhile_is_in_use(
    tmp_path: Path, parents: str, there: bool
) -> None:
    target = tmp_path / parents / "run"
    if there:
        target.mkdir(parents=True)

    def second() -> None:
        with create_folder(target), create_folder(target) as first:
            first.write_provenance({"run": "first"})

    with pytest.raises(ConfigurationError, match="another process or invocation is working on"):
        second()
    assert RunFolder(target).read_provenance()["run"] == "first"
    assert [p.name for p in target.parent.iterdir()] == ["run"]
    assert sorted(p.name for p in target.iterdir()) == ["journal", "provenance.json"]


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such run folder"):
        open_folder(tmp_path / "missing")
    with pytest.raises(ConfigurationError, match=r"missing: run\.yaml, items\.arrow, provenance"):
        open_folder(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match="cannot be a run folder: Not a directory"):
        is_vacant(file)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"v": 1}', "\xff"])
def test_provenance_that_cannot_be_read(folder: RunFolder, content: str) -> None:
    folder.provenance.write_text(content, encoding="latin-1")
    with pytest.raises(
        JournalError, match=r"provenance\.json: (cannot be read|the run folder has format)"
    ):
        folder.read_provenance()


def test_a_failed_write_leaves_the_old_file(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(folder.settings, b"old")

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(JournalError, match=r"run\.yaml: cannot be written: No space left"):
        write_bytes(folder.settings, b"new")
    assert folder.settings.read_bytes() == b"old"
    assert sorted(p.name for p in folder.path.iterdir()) == ["journal", "run.yaml"]
