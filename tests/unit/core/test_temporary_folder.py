"""A temporary folder is deleted with its owner, or by the next one of its kind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fanfold.backends.core import process
from fanfold.backends.core.errors import BackendError
from fanfold.backends.core.process import TemporaryFolder

OWNER = """
import sys
from fanfold.backends.core.process import TemporaryFolder
print(TemporaryFolder("test").path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_what_killed_owners_leave_is_swept_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New folders, those of another kind, and those in use are unchanged."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        (theirs / "within").mkdir()
        monkeypatch.setattr(process, "_YOUNG_S", -1.0)
        mine = TemporaryFolder("test")
        assert theirs.exists()
        owner.kill()
    monkeypatch.setattr(process, "_YOUNG_S", 60.0)
    TemporaryFolder("test").remove()
    assert theirs.exists()
    monkeypatch.setattr(process, "_YOUNG_S", -1.0)
    TemporaryFolder("other").remove()
    assert theirs.exists()
    (tmp_path / "fanfold-test-file").touch()
    TemporaryFolder("test").remove()
    assert not theirs.exists()
    assert mine.path.exists()
    mine.remove()
    assert os.listdir(tmp_path) == ["fanfold-test-file"]  # noqa: PTH208 - names alone


def refusing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(process.fcntl, "flock", flock)  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_shared_file_system_may_have_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Then nothing is deleted, because it may belong to a live process."""
    refusing(monkeypatch, number)
    monkeypatch.setattr(process, "_YOUNG_S", -1.0)
    first, second = TemporaryFolder("test", tmp_path), TemporaryFolder("test", tmp_path)
    assert first.path.exists()
    first.remove()
    second.remove()
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - names alone


def test_a_lock_that_is_refused_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, errno.EIO)
    with pytest.raises(BackendError, match="lock cannot be taken: Input/output error"):
        TemporaryFolder("test", tmp_path)
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - names alone


def test_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else may put them into a shared temporary folder."""
    monkeypatch.setattr(process, "_YOUNG_S", -1.0)
    theirs = tmp_path / "elsewhere"
    theirs.mkdir()
    (theirs / "owner").touch()
    (theirs / "kept").touch()
    (tmp_path / "fanfold-test-link").symlink_to(theirs)
    (tmp_path / "fanfold-test-folder").mkdir()
    (tmp_path / "fanfold-test-folder" / "owner").symlink_to(theirs / "kept")
    TemporaryFolder("test").remove()
    assert (theirs / "kept").exists()
    assert (tmp_path / "fanfold-test-folder").exists()


def test_it_is_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = TemporaryFolder("test", tmp_path)
    finally:
        os.umask(before)
    assert made.path.stat().st_mode & 0o777 == 0o700
    made.remove()
