"""One process serves a node, with locks in the servers folder or without."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from fanfold.backends.core.errors import BackendError
from fanfold.backends.servers import lock
from fanfold.backends.servers.lock import NodeLock, NodeUsers, hold_user_lock, is_served, read_owner
from fanfold.backends.servers.plan import NodeFiles


@pytest.fixture
def files(tmp_path: Path) -> NodeFiles:
    made = NodeFiles(tmp_path / "servers", "node7")
    made.create_folders()
    return made


@pytest.fixture(params=["locks", "no locks", "own tmp"])
def kind(request: pytest.FixtureRequest, files: NodeFiles, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder has locks; it has none; the two processes see different folders of the node."""
    real, near = fcntl.flock, list(range(100))

    def flock(handle: int, what: int) -> None:
        if os.fstat(handle).st_ino == files.lock.stat().st_ino:
            raise OSError(errno.ENOLCK, "no locks")
        real(handle, what)

    if request.param == "no locks":
        files.lock.touch()
        monkeypatch.setattr(fcntl, "flock", flock)
    elif request.param == "own tmp":
        monkeypatch.setattr(lock, "_local_lock_path", lambda f, k: f.folder / f"{near.pop()}.{k}")
    return str(request.param)


@pytest.mark.usefixtures("kind")
def test_only_one_has_the_lock(files: NodeFiles) -> None:
    assert not is_served(files)
    first = NodeLock.try_acquire(files)
    assert first is not None
    assert NodeLock.try_acquire(files) is None
    assert is_served(files)
    assert str(os.getpid()) in read_owner(files)
    first.release()
    assert not is_served(files)
    again = NodeLock.acquire_with_retries(files)
    assert again is not None
    again.release()


def test_hosts_and_folders_do_not_meet(files: NodeFiles, tmp_path: Path) -> None:
    others = [NodeFiles(files.folder, "node8"), NodeFiles(tmp_path / "other", "node7")]
    held = [NodeLock.try_acquire(files)]
    for other in others:
        other.create_folders()
        held.append(NodeLock.try_acquire(other))
    for one in held:
        assert one is not None
        one.release()


async def test_users_are_seen_until_they_leave(files: NodeFiles) -> None:
    users = NodeUsers(files)
    assert not users.has_users()
    async with hold_user_lock(files), hold_user_lock(files):
        assert users.has_users()
        assert not users.try_block_users()
    assert users.try_block_users()
    users.close()


def test_somebody_elses_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert lock.local_lock_folder().parent == tmp_path
    lock.local_lock_folder().rmdir()
    (tmp_path / f"fanfold-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(BackendError, match="not a folder of this user"):
        lock.local_lock_folder()


def test_a_folder_that_others_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    made = lock.local_lock_folder()
    assert made.stat().st_mode & 0o777 == 0o700
    for mode in (0o777, 0o1777, 0o770, 0o702):
        made.chmod(mode)
        with pytest.raises(BackendError, match="others can write this folder"):
            lock.local_lock_folder()
    made.chmod(0o700)
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    made.rename(tmp_path / f"fanfold-{other}")
    with pytest.raises(BackendError, match="not a folder of this user"):
        lock.local_lock_folder()
