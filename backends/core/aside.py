"""A loop in a thread of its own, for nodes that LangGraph runs without one.

The nodes are coroutines. ``graph.invoke`` runs nodes in threads that have no loop; those of one
graph meet in this one, so that they share what is open, as they do under ``ainvoke``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopAside:
    """Runs coroutines for threads without a loop; its own thread lives only while it is used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._thread: _Thread | None = None

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine to its end, with the caller's context variables.

        Args:
            make: Makes the coroutine.
        """
        with self._lock:
            self._users += 1
            thread = self._thread = self._thread or _Thread()
        try:
            future = asyncio.run_coroutine_threadsafe(make(), thread.loop)
            try:
                return future.result()
            except BaseException:
                future.cancel()  # also on KeyboardInterrupt; of no effect on one that has ended
                raise
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._thread = None
                    thread.end()


class _Thread:
    """A thread that runs a loop."""

    def __init__(self) -> None:
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="fanfold-aside", daemon=True)
        self._thread.start()
        self._started.wait()

    def _serve(self) -> None:
        with asyncio.Runner() as runner:  # at its end it cancels what is left, and waits for it
            self.loop = runner.get_loop()
            self.loop.call_soon(self._started.set)
            self.loop.run_forever()

    def end(self) -> None:
        """End the loop, and wait for its thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
