"""Blocking work in a thread, many pieces at a time: a thread costs more than most pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batch(Generic[T, R]):
    """Gathers what is asked for while a thread is at work, and hands it over together.

    It belongs to the loop that first uses it.

    Args:
        work: Takes pieces, and returns one result for each; it blocks.
    """

    def __init__(self, work: Callable[[list[T]], list[R]]) -> None:
        self._work = work
        self._next: tuple[list[T], asyncio.Task[list[R]]] | None = None
        self._tasks = set[asyncio.Task[list[R]]]()
        self._working = asyncio.Lock()

    async def of(self, piece: T) -> R:
        """Return the result for one piece.

        Raises:
            Exception: What the work raised, to all whose pieces went together.
        """
        number, task = self._enter(piece)
        return (await asyncio.shield(task))[number]

    def soon(self, piece: T) -> None:
        """Have a piece worked on, and wait for nothing."""
        self._enter(piece)

    async def settled(self) -> None:
        """Wait until nothing is being worked on."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _enter(self, piece: T) -> tuple[int, asyncio.Task[list[R]]]:
        if self._next is None:
            pieces = list[T]()
            task = asyncio.create_task(self._run(pieces))
            self._next = pieces, task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        pieces, task = self._next
        pieces.append(piece)
        return len(pieces) - 1, task

    async def _run(self, pieces: list[T]) -> list[R]:
        async with self._working:
            self._next = None  # complete: what comes now belongs to the next one
            return await asyncio.to_thread(self._work, pieces)
