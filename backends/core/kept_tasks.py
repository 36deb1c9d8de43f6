"""Tasks that the end of asyncio.run does not cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar, copy_context
from typing import Any, Final, TypeVar

T = TypeVar("T")


KEPT: Final = ContextVar("fanfold_kept", default=False)
"""Whether tasks that are created here are to outlive the cancelling of all tasks."""


def create_kept_task(
    work: Coroutine[Any, Any, T], *, with_its_own: bool = False
) -> asyncio.Task[T]:
    """Create a task that is not cancelled where ``asyncio.run`` ends, and drain what is in flight.

    ``asyncio.run`` ends with cancelling all tasks at once and waiting for them. Only tasks that
    are hidden from ``asyncio.all_tasks`` then go on. Somebody who is not hidden must wait for
    them: whoever waits is cancelled, and drains them.

    Args:
        work: What the task does.
        with_its_own: Whether the tasks that it creates are kept as well, whoever's code does it.
    """
    loop, context = asyncio.get_running_loop(), copy_context()
    if with_its_own:
        context.run(KEPT.set, True)
        _keep_marked(loop)
    return keep(loop.create_task(work, context=context))


def keep(task: asyncio.Task[T]) -> asyncio.Task[T]:
    """Hide a task from ``asyncio.all_tasks``, and return it."""
    asyncio.tasks._unregister_task(task)  # noqa: SLF001 - documented for whoever extends asyncio
    return task


def _keep_marked(loop: asyncio.AbstractEventLoop) -> None:
    """Have a loop keep the tasks that are created where :data:`KEPT` says so."""
    before = loop.get_task_factory()
    if isinstance(before, _Keeping):
        return
    loop.set_task_factory(_Keeping(before))


class _Keeping:
    """A factory of tasks, around the one that a loop had."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(
        self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any
    ) -> asyncio.Future[Any]:
        if self._before is None:
            task = asyncio.Task(work, loop=loop, **options)
        else:
            task = self._before(loop, work, **options)
        context = options.get("context")
        if KEPT.get() if context is None else context.get(KEPT, False):
            asyncio.tasks._unregister_task(task)  # noqa: SLF001 - see keep
        return task
