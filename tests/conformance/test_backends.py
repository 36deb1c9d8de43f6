"""Every backend satisfies the protocol; to add one, add a line to SUBJECTS."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from fanfold.backends.core.errors import WorkerLostError
from fanfold.backends.core.protocols import Backend
from fanfold.backends.core.types import Json
from fanfold.backends.workers import testing
from fanfold.backends.workers.executor import ExecutorBackend
from fanfold.backends.workers.launched.backend import local_launcher_command
from fanfold.backends.workers.registry import make_backends
from fanfold.backends.workers.testing import CHECKS, BackendCase
from fanfold.configs.backend import BackendConfig
from fanfold.graphs.worker import work_shard

pytestmark = pytest.mark.integration


def configured(**settings: object) -> Callable[[Path], BackendCase]:
    """Return what makes a subject of a backend that settings name."""

    def subject(folder: Path) -> BackendCase:
        config = BackendConfig.model_validate(settings)
        return BackendCase(lambda: make_backends(config, work_shard)[0], folder)

    return subject


def threads(folder: Path) -> BackendCase:
    def make() -> Executor:
        return ThreadPoolExecutor(2)

    def backend() -> Backend:
        return ExecutorBackend(make, work_shard, 2, "threads")

    return BackendCase(backend, folder, isolated=False)


def two_processes() -> Executor:
    """Make an executor as a user's own factory does."""
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


SUBJECTS: dict[str, Callable[[Path], BackendCase]] = {
    "threads": threads,
    "processes": configured(kind="local", processes=1),
    "executor": configured(kind="executor", factory=f"{__name__}:two_processes", workers=2),
    "parsl": configured(kind="parsl", workers=1),
    "launched": configured(kind="launched", workers=1),
    "htex_job": configured(
        kind="parsl", config="htex_job", command=shlex.join([*local_launcher_command(1)]), workers=1
    ),
}
HEAVY = {"executor": CHECKS[:1], "htex_job": CHECKS[:1]}
"""Only these checks where the class is checked under another name already."""


class Kept:
    """A backend that stays open from check to check: engines take seconds to start."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.capacity, self.submit = backend.name, backend.capacity, backend.submit
        self.reattach, self.rebuild = backend.reattach, backend.rebuild

    async def start(self) -> None:
        if self.capacity() == 0:
            await self._backend.start()

    async def close(self, grace_s: float = 10.0) -> None:
        """Keep it open."""


@pytest.mark.parametrize("name", SUBJECTS)
async def test_a_backend_keeps_the_contract(name: str, tmp_path: Path) -> None:
    subject = SUBJECTS[name](tmp_path)
    backend = subject.make_backend()
    kept = replace(subject, make_backend=lambda: Kept(backend))
    try:
        for check in HEAVY.get(name, CHECKS):
            if check is not testing.check_close_timeout:
                await check(kept)
    finally:
        await backend.close(2.0)
    if name not in HEAVY:
        await testing.check_close_timeout(subject)


class Hasty(ExecutorBackend):
    """Answers everybody as if all were one shard."""

    async def submit(self, order: dict[str, Json]) -> dict[str, Json]:
        return await super().submit(order | {"shard": "s0"})


async def test_the_checks_can_fail(tmp_path: Path) -> None:
    subject = BackendCase(
        lambda: Hasty(lambda: ThreadPoolExecutor(1), work_shard, 1, "h"), tmp_path
    )
    with pytest.raises(AssertionError, match="shard"):
        await testing.check_answer_order(subject)


async def test_a_place_that_is_not_started_takes_nothing(tmp_path: Path) -> None:
    backend = threads(tmp_path).make_backend()
    assert backend.capacity() == 0
    with pytest.raises(Exception, match="not started") as caught:
        await backend.submit({})
    assert not isinstance(caught.value, WorkerLostError)
