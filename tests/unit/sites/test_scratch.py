"""A temporary folder goes with its owner, or with the next one of its kind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fanfold.backends.sites import scratch
from fanfold.backends.sites.scratch import Scratch

OWNER = """
import sys
from fanfold.backends.sites.scratch import Scratch
print(Scratch("test").path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_what_killed_owners_leave_is_swept_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is young, of another kind, or somebody's, is left alone."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        (theirs / "within").mkdir()
        monkeypatch.setattr(scratch, "_YOUNG_S", -1.0)
        mine = Scratch("test")
        assert theirs.exists()
        owner.kill()
    monkeypatch.setattr(scratch, "_YOUNG_S", 60.0)
    Scratch("test").remove()
    assert theirs.exists()
    monkeypatch.setattr(scratch, "_YOUNG_S", -1.0)
    Scratch("other").remove()
    assert theirs.exists()
    (tmp_path / "fanfold-test-file").touch()
    Scratch("test").remove()
    assert not theirs.exists()
    assert mine.path.exists()
    mine.remove()
    assert os.listdir(tmp_path) == ["fanfold-test-file"]  # noqa: PTH208 - names alone
