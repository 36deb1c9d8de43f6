"""kill -9 of a worker that a launcher started, and of the launcher."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fanfold.tests.integration.runs.conftest import LabMaker

from .test_workers_kill import (
    LAUNCHED,
    STREAMS,
    asked_again,
    begun,
    leftovers,
    lived,
    marked,
    the_first,
    their_parent,
)

pytestmark = pytest.mark.integration

MPIEXEC: dict[str, Any] = LAUNCHED | {"command": "mpiexec -n {workers}"}
needs_mpich = pytest.mark.skipif(
    shutil.which("mpiexec.hydra") is None, reason="no mpiexec of mpich (Debian: mpich)"
)
LAUNCHERS = [
    pytest.param(LAUNCHED, id="local"),
    pytest.param(MPIEXEC, id="mpiexec", marks=needs_mpich),
]


def their_launcher(workers: list[int]) -> Iterable[int]:
    """Return the process that the coordinator began: the leader of the workers' group."""
    return {os.getpgid(pid) for pid in workers}


def mpiexec(workers: list[int]) -> Iterable[int]:
    """Return mpiexec, the parent of the proxy that began the workers."""
    return their_parent([*their_parent(workers)])


@pytest.mark.parametrize("backend", LAUNCHERS)
async def test_a_worker_and_then_the_launcher_are_killed(
    lab_of: LabMaker, backend: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one of mpich's workers the others are killed, and all of them are started again."""
    token = f"FANFOLD_TEST={os.urandom(6).hex()}"
    async with lab_of(items=300) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        lab.config["backend"] = backend
        monkeypatch.setenv(*token.split("="))
        launcher = their_launcher if backend is LAUNCHED else mpiexec
        result = await lived(lab, the_first, launcher)
        assert result.exit_code == 0
        assert len(begun(lab)) >= 4
        lab.assert_whole(aggregate, again=0)
        assert 0 < asked_again(lab) <= 2 * STREAMS
        assert leftovers(lab) == []
        assert not marked(token)
        assert (Path(lab.out) / "workers.log").is_file()
