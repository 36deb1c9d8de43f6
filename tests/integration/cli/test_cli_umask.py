"""Files follow the umask, of this process and of workers."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fanfold.backends.servers.node_supervisor import EndpointsFile
from fanfold.backends.storage.results import replace_file
from fanfold.backends.storage.run_folder import create_folder, write_bytes

from .conftest import Shell

pytestmark = pytest.mark.integration


def modes(folder: Path, suffix: str = "") -> set[tuple[str, int]]:
    """Return kinds and permissions of all that lies in a folder, and of itself."""
    return {
        ("folder" if path.is_dir() else "file", stat.S_IMODE(path.stat().st_mode))
        for path in (folder, *folder.rglob("*"))
        if not suffix or path.suffix == suffix
    }


@pytest.fixture(params=[0o077, 0o022, 0o002, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_runs(shell: Shell, umask: int) -> None:
    shell.write(cache="cache", backend={"processes": 2 if umask == 0o027 else 1})
    for words in (("run", "c.yaml", "--out", "made/run"), ("resume", "made/run")):
        assert shell(*words).code == 0
    for folder in (shell.folder / "made", shell.folder / "cache"):
        assert modes(folder) == {("folder", 0o777 & ~umask), ("file", 0o666 & ~umask)}
    assert shell("results", "made/run", "-o", "out.jsonl").code == 0
    assert stat.S_IMODE((shell.folder / "out.jsonl").stat().st_mode) == 0o666 & ~umask


def test_job_scripts_can_be_run_by_those_who_can_read_them(shell: Shell, umask: int) -> None:
    shell.write(endpoints={"file": "servers"}, model={"name": "m"}, node={"serve": "serve"})
    qsub = shell.folder / "qsub"
    qsub.write_text("#!/bin/sh\necho 1.standin\n")
    qsub.chmod(0o755)
    shell.patch.setenv("PATH", f"{shell.folder}:{os.environ['PATH']}")
    given = ("--nodes", "1", "--walltime", "1h", "--queue", "q", "--account", "a")
    said = shell("submit", "c.yaml", "--out", "run", "--site", "polaris", *given)
    assert said.code == 0, said.err
    run = shell.folder / "run"
    assert modes(run / "cluster", ".sh") == {("file", 0o777 & ~umask)}
    assert {mode for kind, mode in modes(run) if kind == "folder"} == {0o777 & ~umask}


def test_files_that_are_replaced(tmp_path: Path, umask: int) -> None:
    for _ in range(2):
        write_bytes(tmp_path / "a", b"a")
        with replace_file(tmp_path / "b") as file:
            file.write(b"b")
        EndpointsFile(tmp_path / "c", "n1").write(["n1:8000"])
    with create_folder(tmp_path / "run"):
        pass
    for name in "abc":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o777 & ~umask


def test_links_in_the_place_of_partial_files_are_not_followed(tmp_path: Path) -> None:
    """Somebody else may put them beside a file that is written to a shared folder."""
    theirs = tmp_path / "theirs"
    theirs.write_text("kept")
    for name in "abd":
        (tmp_path / f".{name}.partial").symlink_to(theirs)
    write_bytes(tmp_path / "a", b"a")
    with replace_file(tmp_path / "b") as file:
        file.write(b"b")
    EndpointsFile(tmp_path / "d", "n1").write(["n1:8000"])
    assert theirs.read_text() == "kept"
    assert all((tmp_path / name).is_file() for name in "abd")
