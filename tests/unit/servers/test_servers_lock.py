"""One process serves a node, with locks in the servers folder or without."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from fanfold.backends.core.errors import SiteError
from fanfold.backends.servers import lock
from fanfold.backends.servers.lock import HostLock, Users, holder, is_served, using
from fanfold.backends.servers.plan import Files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path / "servers", "node7")
    made.make()
    return made


@pytest.fixture(params=["locks", "no locks", "own tmp"])
def kind(request: pytest.FixtureRequest, files: Files, monkeypatch: pytest.MonkeyPatch) -> str:
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
        monkeypatch.setattr(lock, "_near", lambda f, k: f.folder / f"{near.pop()}.{k}")
    return str(request.param)


@pytest.mark.usefixtures("kind")
def test_only_one_has_the_lock(files: Files) -> None:
    assert not is_served(files)
    first = HostLock.take(files)
    assert first is not None
    assert HostLock.take(files) is None
    assert is_served(files)
    assert str(os.getpid()) in holder(files)
    first.give_back()
    assert not is_served(files)
    again = HostLock.patiently(files)
    assert again is not None
    again.give_back()


def test_hosts_and_folders_do_not_meet(files: Files, tmp_path: Path) -> None:
    others = [Files(files.folder, "node8"), Files(tmp_path / "other", "node7")]
    held = [HostLock.take(files)]
    for other in others:
        other.make()
        held.append(HostLock.take(other))
    for one in held:
        assert one is not None
        one.give_back()


async def test_users_are_seen_until_they_leave(files: Files) -> None:
    users = Users(files)
    assert not users.any()
    async with using(files), using(files):
        assert users.any()
        assert not users.shut_out()
    assert users.shut_out()
    users.close()


def test_somebody_elses_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert lock.node_folder().parent == tmp_path
    lock.node_folder().rmdir()
    (tmp_path / f"fanfold-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(SiteError, match="no folder of this user's"):
        lock.node_folder()


def test_a_folder_that_others_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    made = lock.node_folder()
    assert made.stat().st_mode & 0o777 == 0o700
    for mode in (0o777, 0o1777, 0o770, 0o702):
        made.chmod(mode)
        with pytest.raises(SiteError, match="others can write this folder"):
            lock.node_folder()
    made.chmod(0o700)
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    made.rename(tmp_path / f"fanfold-{other}")
    with pytest.raises(SiteError, match="no folder of this user's"):
        lock.node_folder()
