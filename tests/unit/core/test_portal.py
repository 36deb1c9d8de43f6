"""The portal: one event loop for all threads that use it at a time, and only as long."""

from __future__ import annotations

import asyncio
import contextvars
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from fanfold.backends.core.aio import PortalProvider

NAME: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")


def asides() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fanfold-aside"]


async def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_threads_meet_in_one_loop() -> None:
    aside, met, arrived = PortalProvider(), asyncio.Event(), list[int]()

    async def meet(number: int) -> asyncio.AbstractEventLoop:
        arrived.append(number)
        if len(arrived) == 4:
            met.set()
        await met.wait()
        return asyncio.get_running_loop()

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(aside.run, partial(meet, number)) for number in range(4)]
        loops = {future.result(30) for future in futures}
    assert len(loops) == 1
    assert not asides()


def test_it_begins_anew_after_its_last_user() -> None:
    aside = PortalProvider()
    first, second = aside.run(_loop), aside.run(_loop)
    assert first is not second
    assert first.is_closed()
    assert second.is_closed()


def test_what_is_raised_reaches_the_caller() -> None:
    async def fail() -> None:
        msg = "my own"
        raise LookupError(msg)

    with pytest.raises(LookupError, match="my own"):
        PortalProvider().run(fail)
    assert not asides()


def test_the_callers_context_variables_are_seen() -> None:
    async def name() -> str:
        return NAME.get()

    aside = PortalProvider()
    assert contextvars.Context().run(aside.run, name) == "nobody"
    token = NAME.set("me")
    try:
        assert aside.run(name) == "me"
    finally:
        NAME.reset(token)


def test_what_is_left_in_the_loop_ends_with_it() -> None:
    ended = list[bool]()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    tasks = set[asyncio.Task[None]]()

    async def leave_one() -> None:
        tasks.add(asyncio.create_task(forever()))
        await asyncio.sleep(0)

    PortalProvider().run(leave_one)
    assert ended == [True]
    assert all(task.cancelled() for task in tasks)


def test_an_interrupted_coroutine_is_cancelled_once_and_cleans_up() -> None:
    started, handler = threading.Event(), signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        started.wait(30)
        time.sleep(0.002)  # the caller waits by then
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            for step in range(3):
                await asyncio.sleep(0.002)
                ended.append(step)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(30):
            started.clear()
            ended = list[int]()
            thread = threading.Thread(target=interrupt)
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                PortalProvider().run(work)
            thread.join()
            assert ended == [0, 1, 2]
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not asides()
