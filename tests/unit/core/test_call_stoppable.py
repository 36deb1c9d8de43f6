"""Work in a thread that ends with the task that waits for it."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fanfold.backends.core.aio import call_stoppable, check_stopped
from fanfold.backends.core.errors import RunStoppedError
from fanfold.backends.core.types import Row
from fanfold.backends.inputs import formats
from fanfold.backends.inputs.base import RowSource
from fanfold.backends.inputs.item_store import load_input
from fanfold.configs.models import InputConfig


async def test_results_and_errors_are_those_of_the_function() -> None:
    assert await call_stoppable(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await call_stoppable(divmod, 1, 0)
    check_stopped()  # nothing to stop here


async def test_a_cancelled_caller_stops_the_function_and_waits_for_it() -> None:
    started, ended = threading.Event(), list[str]()

    def work() -> None:
        started.set()
        try:
            while True:
                check_stopped()
        except RunStoppedError:
            ended.append("stopped")
            raise

    call = asyncio.create_task(call_stoppable(work))
    await asyncio.to_thread(started.wait)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended == ["stopped"]
    await call_stoppable(check_stopped)  # another call is not stopped


async def test_a_caller_that_is_cancelled_again_waits_for_the_function_too() -> None:
    started, free = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        free.wait()
        check_stopped()

    call = asyncio.create_task(call_stoppable(work))
    await asyncio.to_thread(started.wait)
    for _ in range(3):
        call.cancel()
        await asyncio.wait({call}, timeout=0.01)
        assert not call.done()
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_any_input_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def rows() -> Iterator[tuple[int, Row]]:
        for n in itertools.count():
            begun.set()
            yield n, {"text": str(n)}

    source = RowSource("endless rows", rows, str)
    monkeypatch.setattr(formats, "open_source", lambda *_: source)
    target = tmp_path / "items.arrow"
    call = asyncio.create_task(call_stoppable(load_input, InputConfig(), target, ["text"]))
    await asyncio.to_thread(begun.wait)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not list(tmp_path.iterdir())
