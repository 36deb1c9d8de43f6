"""Runs on executors: Dask and Ray, if installed, and one without workers."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import Executor, Future
from importlib.util import find_spec
from typing import Any

import orjson
import pytest

from fanfold.backends.workers.registry import make_backends
from fanfold.backends.workers.testing import (
    CHECKS,
    BackendCase,
    Check,
    check_dead_worker,
    check_item_errors,
)
from fanfold.configs.backend import BackendConfig
from fanfold.graphs.worker import work_shard
from fanfold.tests.integration.runs.conftest import STREAMS, Lab, LabMaker
from fanfold.tests.integration.runs.test_workers_kill import (
    asked_again,
    begun,
    lived,
    marked,
    the_first,
)
from fanfold.tests.integration.workers.academy.academy_run import alive
from fanfold.tests.support.command_server import Command, get_command_server

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore"),  # the engines' own
]

ENGINES = [
    pytest.param(
        {"kind": "executor", "factory": f"fanfold.examples.executors:on_{name}", "workers": 2},
        id=name,
        marks=[
            pytest.mark.skipif(find_spec(package) is None, reason=f"needs pip install {package}"),
            pytest.mark.xdist_group(name),
        ],
    )
    for name, package in (("dask", "distributed"), ("ray", "ray"))
]


QUICK = (check_item_errors, check_dead_worker)
"""Checks that run each time; each of them starts an engine of its own."""


class Deaf(Executor):
    """Takes calls as MPI does where it can start no workers: nobody ever answers."""

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        return Future()

    def shutdown(self, wait: bool = True) -> None:  # type: ignore[override]  # as Dask's
        assert wait


async def run_elsewhere(lab: Lab, **backend: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in another process until it ends."""
    lab.config["backend"] = backend
    settings = lab.home / "config.yaml"
    settings.write_bytes(orjson.dumps(lab.config))
    arguments = ("run", str(settings), "--out", str(lab.out))
    return await get_command_server().run(Command(arguments, cwd=str(lab.home)))


async def test_an_executor_whose_workers_never_come(lab_of: LabMaker) -> None:
    async with lab_of(items=20) as lab:
        factory = "fanfold.tests.integration.runs.test_executors:Deaf"
        done = await run_elsewhere(lab, kind="executor", factory=factory, queue_s=1.0)
    assert done.returncode == 5
    assert "Interrupted: no worker has responded in the 1 s" in done.stderr
    assert "(backend.queue_s); check that workers were started" in done.stderr
    assert "could not be shut down" not in done.stderr


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=check.__name__, marks=[] if check in QUICK else pytest.mark.long)
        for check in CHECKS
    ],
)
@pytest.mark.parametrize("backend", ENGINES)
async def test_an_engine_keeps_the_contract(
    backend: dict[str, Any], check: Check, tmp_path: Any
) -> None:
    config = BackendConfig.model_validate(backend)
    await check(BackendCase(lambda: make_backends(config, work_shard)[0], tmp_path))


@pytest.mark.parametrize("backend", ENGINES)
async def test_an_engine_as_a_user_has_it(
    lab_of: LabMaker, backend: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line: each of 300 items once, a quiet terminal, and nothing left behind."""
    token = f"FANFOLD_TEST={os.urandom(6).hex()}"
    monkeypatch.setenv(*token.split("="))
    async with lab_of(items=300, ttft_s=0.0) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        done = await run_elsewhere(lab, **backend)
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if line.startswith("INFO")]
        assert "could not be shut down" not in done.stderr
        lab.assert_whole(aggregate, again=0)
        await lab.until(lambda: not marked(token))


@pytest.mark.parametrize("backend", ENGINES)
async def test_a_worker_of_an_engine_is_killed(lab_of: LabMaker, backend: dict[str, Any]) -> None:
    """With shards in flight; what it had recorded is not asked again."""
    async with lab_of(items=400) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        lab.config["backend"] = backend
        result = await lived(lab, the_first)
        assert result.exit_code == 0
        lab.assert_whole(aggregate, again=0)
        again = asked_again(lab)
        print(f"{backend['factory']}: {again} items asked again")
        assert 0 < again <= STREAMS // 2


@pytest.mark.parametrize("backend", ENGINES)
async def test_the_coordinator_of_an_engine_is_killed(
    lab_of: LabMaker, backend: dict[str, Any]
) -> None:
    """Its workers end with it, and other workers run the rest."""
    async with lab_of(items=300) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        lab.config["backend"] = backend
        await lab.killed_at(100)
        await lab.until(lambda: not any(map(alive, begun(lab))))
        assert asked_again(lab) == 0
        assert (await lab.live(overrides=("backend={kind: local}",))).exit_code == 0
        lab.assert_whole(aggregate, again=STREAMS)
        print(f"{backend['factory']}: {asked_again(lab)} items asked again by the next life")
