"""Real workers that a command starts, of a kind that loads quickly."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fanfold.backends.core.errors import BackendError, ConfigurationError, WorkerLostError
from fanfold.backends.workers.launched.backend import (
    LaunchedBackend,
)
from fanfold.configs.backend import BackendConfig
from fanfold.tests.integration.workers.launched.work import play

pytestmark = pytest.mark.integration
ONE_AND_ANOTHER = ("sh", "-c", '"$@" & while [ ! -e "$GO" ]; do sleep 0.1; done; "$@"', "sh")


def backend(
    *words: str, workers: int = 1, log: Path | None = None, host: str = "127.0.0.1"
) -> LaunchedBackend:
    config = BackendConfig(
        kind="launched",
        command=shlex.join(words) if words else None,
        workers=workers,
        host=host,
        silence_s=60,
        queue_s=60,
    )
    return LaunchedBackend(config, play, log)


@asynccontextmanager
async def opened(
    *words: str, workers: int = 1, log: Path | None = None
) -> AsyncIterator[LaunchedBackend]:
    made = backend(*words, workers=workers, log=log)
    await made.start()
    try:
        yield made
    finally:
        await made.close(2.0)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110 - other processes set no events
            await asyncio.sleep(0.05)


async def failed(submitted: Awaitable[object]) -> BaseException:
    (error,) = await asyncio.gather(submitted, return_exceptions=True)
    assert isinstance(error, BaseException)
    return error


async def test_a_worker_takes_no_proxy_and_hands_no_token_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    async with opened() as place:
        assert place.capacity() == 1
        answer = await place.submit({"n": 5})
        assert (answer["n"], answer["token"]) == (5, None)
        assert answer["pid"] != os.getpid()


async def test_what_the_work_raises_is_told_by_its_kind() -> None:
    async with opened() as place:
        error = await failed(place.submit({"raises": "ValueError"}))
        assert isinstance(error, WorkerLostError)
        assert "ValueError: as it was told" in str(error)
        error = await failed(place.submit({"raises": "ImportError"}))
        assert isinstance(error, ConfigurationError)
        assert (await place.submit({"n": 1}))["n"] == 1


async def test_a_worker_that_can_do_no_more_leaves(tmp_path: Path) -> None:
    """It would take all tasks from the others; waiting tasks go to them."""
    log = tmp_path / "workers.log"
    async with opened(workers=2, log=log) as place:
        await until(lambda: place.capacity() == 2)
        hopeless = place.submit({"hopeless": True})
        others = [place.submit({"n": n, "seconds": 0.2}) for n in range(4)]
        first, *rest = await asyncio.gather(hopeless, *others)
        assert first["error"]["text"] == "there is no server"
        assert len({answer["pid"] for answer in rest}) == 1
        await until(lambda: place.capacity() == 1)
    assert "this worker exits: there is no server" in log.read_text()


async def test_a_stop_reaches_workers_that_share_no_folder() -> None:
    async with opened() as place:
        working = asyncio.ensure_future(place.submit({"n": 1, "until_stopped": True}))
        done, _ = await asyncio.wait({working}, timeout=0.5)
        assert not done
        await place.stop()
        assert (await asyncio.wait_for(working, 60))["n"] == 1


async def test_a_late_worker_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GO", str(tmp_path / "go"))
    async with opened(*ONE_AND_ANOTHER) as place:
        assert place.capacity() == 1
        (tmp_path / "go").touch()
        await until(lambda: place.capacity() == 2)
        answers = await asyncio.gather(*(place.submit({"seconds": 1}) for _ in range(2)))
        assert len({answer["pid"] for answer in answers}) == 2


async def the_first_is_killed(place: LaunchedBackend) -> tuple[int, int]:
    """Kill the only worker; return its process and its launcher's group."""
    first = (await place.submit({}))["pid"]
    launcher = os.getpgid(first)
    os.kill(first, signal.SIGKILL)
    await until(lambda: place.capacity() == 0)
    return first, launcher


async def test_a_launcher_that_lives_has_workers_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first worker dies before the second has come: nothing is started again."""
    monkeypatch.setenv("GO", str(tmp_path / "go"))
    async with opened(*ONE_AND_ANOTHER) as place:
        first, launcher = await the_first_is_killed(place)
        mending = asyncio.ensure_future(place.rebuild())
        (tmp_path / "go").touch()
        await asyncio.wait_for(mending, 90)
        second = (await place.submit({}))["pid"]
        assert (second != first, os.getpgid(second)) == (True, launcher)


async def test_workers_that_have_come_meanwhile_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of the last one and the mending."""
    monkeypatch.setenv("GO", str(tmp_path / "go"))
    async with opened(*ONE_AND_ANOTHER) as place:
        first, launcher = await the_first_is_killed(place)
        (tmp_path / "go").touch()
        await until(lambda: place.capacity() == 1)
        await place.rebuild()
        second = (await place.submit({}))["pid"]
        assert (second != first, os.getpgid(second)) == (True, launcher)
        hangs = asyncio.ensure_future(place.submit({"seconds": 600}))
        await asyncio.sleep(0)  # it is given out
        hangs.cancel()
        await place.rebuild()
        assert os.getpgid((await place.submit({}))["pid"]) != launcher


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("sh", "-c", "echo the queue is closed; exit 3"), "ended with code 3 before a worker"),
        (("no-such-program-here",), "not found"),
        (("env", "-u", "FANFOLD_COORDINATOR_TOKEN"), "have the launcher pass them on"),
        (("env", "FANFOLD_COORDINATOR_TOKEN=wrong"), "refused this worker: 401"),
    ],
)
async def test_a_launcher_that_brings_nobody(words: tuple[str, ...], says: str) -> None:
    place = backend(*words)
    with pytest.raises(BackendError, match=says) as caught:
        await place.start()
    if "sh" in words:
        assert "the queue is closed" in caught.value.message
    assert place.capacity() == 0
    assert isinstance(await failed(place.submit({})), BackendError)


async def test_a_launcher_that_ends_is_told_and_started_again(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    log = tmp_path / "workers.log"
    words = ("sh", "-c", '"$@"; echo all have ended; exit 9', "sh")
    with caplog.at_level(logging.WARNING):
        async with opened(*words, log=log) as place:
            worker = (await place.submit({}))["pid"]
            working = asyncio.ensure_future(place.submit({"seconds": 600}))
            os.kill(worker, signal.SIGKILL)
            assert isinstance(await failed(working), WorkerLostError)
            await place.rebuild()
            assert (await place.submit({"n": 2}))["n"] == 2
    assert "all have ended" in caplog.text
    assert "all have ended" in log.read_text()


async def test_nothing_outlives_a_close_however_it_hangs(tmp_path: Path) -> None:
    """Neither a launcher that heeds no signal, nor what it has started."""
    hangs = tmp_path / "hangs.py"
    hangs.write_text(
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen(sys.argv[1:])\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    place = backend(*shlex.split(f"{sys.executable} {hangs}"), log=log)
    await place.start()
    worker = (await place.submit({}))["pid"]
    launcher = int(log.read_text())
    await asyncio.wait_for(place.close(0.2), 30)
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (worker, launcher)))


async def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    place = backend(log=tmp_path / "none" / "log")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        await place.start()
    assert place.capacity() == 0
    await place.close()
