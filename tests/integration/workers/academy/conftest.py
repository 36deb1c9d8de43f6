"""Exchanges, and runs over Academy whose agents can be found and killed."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.tests.integration.workers.academy.academy_run import AcademyRun

PASSWORD = "let-me-in"


@pytest.fixture(autouse=True)
def _no_litter() -> Iterator[None]:
    """What Academy leaves to the garbage collector is found here, where it is expected."""
    yield
    gc.collect()


def _answers(exchange: dict[str, Any]) -> bool:
    at = {key: exchange[key] for key in ("host", "port", "password") if key in exchange}
    with redis.Redis(**at, retry=Retry(NoBackoff(), 0), socket_connect_timeout=2) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


def _found(where: str) -> dict[str, Any] | None:
    """Return the Redis at a URL if it answers."""
    url = urlsplit(where)
    exchange: dict[str, Any] = {"kind": "redis", "host": url.hostname, "port": url.port or 6379}
    if url.password:
        exchange["password"] = url.password
    return exchange if _answers(exchange) else None


@pytest.fixture(scope="session")
def redis_exchange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Settings of a Redis exchange: the named one, else one of our own, else the usual one.

    Ours has a password, and nobody else's keys.
    """
    named, program = os.environ.get("FANFOLD_TEST_REDIS_URL"), shutil.which("redis-server")
    if named or program is None:
        if found := _found(named or "redis://127.0.0.1:6379"):
            yield found
            return
        pytest.skip(f"no redis-server is installed, and none answers at {named or 'port 6379'}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    exchange = {"kind": "redis", "host": "127.0.0.1", "port": port, "password": PASSWORD}
    options = ["--bind", "127.0.0.1", "--port", f"{port}", "--save", "", "--requirepass", PASSWORD]
    with subprocess.Popen(
        [program, *options], cwd=tmp_path_factory.mktemp("redis"), stdout=subprocess.DEVNULL
    ) as server:
        try:
            while not _answers(exchange):
                assert server.poll() is None, "redis-server ended"
            yield exchange
        finally:
            server.kill()


@pytest_asyncio.fixture
async def academy_run(tmp_path: Path) -> AsyncIterator[AcademyRun]:
    """A academy_run whose fleet takes about a tenth of a second for an answer."""
    spec = SimulationSpec.fast(nodes=2, ttft_s=0.08, tpot_s=0.001, jitter=0.3)
    async with SimulatedFleet(spec) as fleet:
        yield AcademyRun(tmp_path, fleet)
