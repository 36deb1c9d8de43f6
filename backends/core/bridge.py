"""Synchronous doors onto asynchronous calls.

A call from another thread than the fleet's own is carried to the fleet's loop, so that balancing
and limits hold over both. When that loop is the caller's own (which would wait for itself), or
none runs, a private loop in a thread of its own serves, with its own connections.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from .calls import BLOCKED_LOOPS

_T = TypeVar("_T")


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class SyncBridge:
    """Runs coroutines for callers that are not in a loop, or block one.

    Args:
        home: Returns the loop that the fleet lives in, or None.
        farewell: Called in the private loop before it ends, to close what was opened there.
    """

    def __init__(
        self,
        home: Callable[[], asyncio.AbstractEventLoop | None],
        farewell: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._home = home
        self._farewell = farewell
        self._lock = threading.Lock()
        self._private: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run one coroutine to its end, with the caller's context variables."""
        future, here = asyncio.run_coroutine_threadsafe(coroutine, self._loop()), _running()
        if here is not None:
            BLOCKED_LOOPS.add(here)
        try:
            return future.result()
        except BaseException:
            # Also KeyboardInterrupt: the call must not go on unseen. No effect when it is done.
            future.cancel()
            raise
        finally:
            BLOCKED_LOOPS.discard(here)

    def iterate(self, source: AsyncIterator[_T]) -> Iterator[_T]:
        """Yield what an asynchronous generator yields, and close it at the end."""

        async def step() -> list[_T]:
            try:
                return [await anext(source)]
            except StopAsyncIteration:
                return []

        try:
            while got := self.run(step()):
                yield from got
        finally:
            if (close := getattr(source, "aclose", None)) is not None:
                self.run(close())

    def _loop(self) -> asyncio.AbstractEventLoop:
        home = self._home()
        if home is not None and home.is_running() and home is not _running():
            return home
        with self._lock:
            if self._private is None:
                self._private = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._private.run_forever, name="fanfold-sync", daemon=True
                )
                self._thread.start()
            return self._private

    def close(self) -> None:
        """End the private loop, if there is one."""
        with self._lock:
            loop, thread = self._private, self._thread
            self._private = self._thread = None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._farewell(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
