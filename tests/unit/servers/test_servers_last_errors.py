"""Last errors of the servers of a job that has none left."""

from __future__ import annotations

from pathlib import Path

from fanfold.backends.servers.events import last_errors
from fanfold.backends.servers.plan import ServerFailure


def test_some_nodes_tell_and_the_others_are_counted(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for n in range(5):
        failure = ServerFailure(f"n{n}: no server is left\n  | why", "plan")
        failure.write(tmp_path / "logs" / f"n{n}.failed")
    words = last_errors(tmp_path, tmp_path / "serve-1.log")
    assert words[:2] == ["n0: no server is left", "  | why"]
    assert words[-1] == f"… and 2 more nodes: {tmp_path}/logs/*.failed"


def test_without_them_the_log_of_the_launcher_tells(tmp_path: Path) -> None:
    log = tmp_path / "serve-1.log"
    log.write_text("begin\n" * 1000 + "mpiexec: no such host\n")
    words = last_errors(tmp_path, log)
    assert words[0] == f"from {log}:"
    assert words[-1] == "mpiexec: no such host"
    assert len(words) < 30


def test_with_nothing_to_read_it_says_so(tmp_path: Path) -> None:
    (_, said) = last_errors(tmp_path, tmp_path / "serve-1.log")
    assert said.endswith("cannot be read: No such file or directory)")
