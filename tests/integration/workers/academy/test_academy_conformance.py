"""Academy satisfies the backend protocol, over each exchange."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.workers import testing as checks
from fanfold.backends.workers.registry import make_backends
from fanfold.backends.workers.testing import CHECKS, BackendCase, Check
from fanfold.configs.backend import BackendConfig
from fanfold.graphs.worker import work_shard

pytestmark = [
    pytest.mark.integration,
    # Academy's own habits
    pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed (connection|client session):ResourceWarning"),
]


def threads() -> Executor:
    """Make an executor whose agents share this process."""
    return ThreadPoolExecutor(4)


def processes() -> Executor:
    """Make an executor that breaks when one of its processes dies."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def subject(folder: Path, isolated: bool, **settings: Any) -> BackendCase:
    config = BackendConfig.model_validate({"kind": "academy", "workers": 1, "slots": 2} | settings)
    return BackendCase(lambda: make_backends(config, work_shard)[0], folder, isolated)


def named(check: Callable[..., Any]) -> str:
    return check.__name__


@pytest.mark.parametrize("check", CHECKS, ids=named)
async def test_agents_in_this_process(check: Check, tmp_path: Path) -> None:
    await check(subject(tmp_path, isolated=False, exchange={"kind": "local"}))


@pytest.mark.parametrize("check", CHECKS, ids=named)
async def test_agents_on_an_executor_of_the_users(check: Check, tmp_path: Path) -> None:
    await check(subject(tmp_path, isolated=False, executor=f"{__name__}:threads"))


@pytest.mark.parametrize(
    "check",
    [checks.check_hung_worker, checks.check_large_results],
    ids=named,
)
async def test_processes_over_http(check: Check, tmp_path: Path) -> None:
    await check(subject(tmp_path, isolated=True))


@pytest.mark.xdist_group("redis")
@pytest.mark.parametrize("check", [checks.check_dead_worker, checks.check_close_timeout], ids=named)
async def test_processes_over_redis(
    check: Check, tmp_path: Path, redis_exchange: dict[str, Any]
) -> None:
    await check(subject(tmp_path, isolated=True, exchange=redis_exchange))


async def test_an_executor_that_breaks_is_made_anew(tmp_path: Path) -> None:
    broken = subject(tmp_path, isolated=True, executor=f"{__name__}:processes")
    await checks.check_dead_worker(broken)
