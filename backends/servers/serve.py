"""The two ways to serve a node: until told to stop, or for as long as workers use it."""

from __future__ import annotations

import asyncio
from typing import Final

from .lock import HostLock, Users, holder, linger_not, lingers, using
from .plan import Files, NodePlan, files_of
from .supervisor import Orders, keep

_STANDBY_S: Final = 1.0
_LOOK_S: Final = 1.0


async def serve(plan: NodePlan, orders: Orders) -> None:
    """Serve a node until told to stop.

    Where another process serves it already, nothing is started; this one stands by, and takes
    over when the other has ended. What a worker has started ends with this one, or when the last
    worker has left.

    Raises:
        SiteError: All servers were given up; with the last lines of each.
        ConfigurationError: The servers folder cannot be made.
    """
    files = files_of(plan)
    await asyncio.to_thread(files.make)
    async with using(files):
        lock = await _taken(plan, files, orders)
        if lock is not None:
            await keep(plan, lock, orders)
            return
    if await asyncio.to_thread(lingers, files):
        orders.say(f"{plan.host}: the servers that a worker has started end with the last worker")
        await _ended(files, orders)


async def _taken(plan: NodePlan, files: Files, orders: Orders) -> HostLock | None:
    """Wait for the right to serve the node; None when told to stop before."""
    told = False
    while not orders.stop.is_set():
        lock = await asyncio.to_thread(HostLock.patiently, files)
        if lock is not None:
            return lock
        if not told:
            who = await asyncio.to_thread(holder, files)
            orders.say(f"{plan.host}: is served already, by {who}; standing by")
            told = True
        await _happens(orders.stop, _STANDBY_S)
    return None


async def _ended(files: Files, orders: Orders) -> None:
    """Have the servers that a worker has started end, and wait for that unless in a hurry."""
    while await asyncio.to_thread(lingers, files):
        await asyncio.to_thread(linger_not, files)  # again: it may just have begun
        if orders.hurry.is_set():
            return
        await _happens(orders.hurry, _LOOK_S)


async def serve_users(plan: NodePlan, lock: HostLock, orders: Orders) -> None:
    """Serve a node for as long as somebody uses it.

    Args:
        plan: What to serve.
        lock: The right to do so; it is given back at the end.
        orders: What the process is told from outside.

    Raises:
        SiteError: All servers were given up; with the last lines of each.
    """
    users = await asyncio.to_thread(Users, files_of(plan))
    watch = asyncio.create_task(_until_unused(users, plan.linger_s, orders))
    try:
        await keep(plan, lock, orders)
    finally:
        watch.cancel()
        users.close()


async def _until_unused(users: Users, linger_s: float, orders: Orders) -> None:
    """Order a stop when nobody has used the servers for a while."""
    loop = asyncio.get_running_loop()
    used = loop.time()
    while True:
        if users.any():
            used = loop.time()
        elif (users.asked() or loop.time() - used >= linger_s) and users.shut_out():
            orders.say(f"nobody has used the servers for {loop.time() - used:.0f} s")
            orders.stop.set()
            return
        await asyncio.sleep(min(_LOOK_S, max(0.05, linger_s / 4)))


async def _happens(event: asyncio.Event, timeout_s: float) -> None:
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait({waiting}, timeout=timeout_s)
    waiting.cancel()
