"""The two ways to serve a node: until told to stop, or for as long as workers use it."""

from __future__ import annotations

import asyncio
from typing import Final

from .keeper import Orders, keep
from .lock import HostLock, Users, holder, using
from .plan import NodePlan, files_of

_STANDBY_S: Final = 1.0
_LOOK_S: Final = 1.0


async def serve(plan: NodePlan, orders: Orders) -> None:
    """Serve a node until told to stop.

    Where another process serves it already, nothing is started; this one stands by, and takes
    over when the other has ended.

    Raises:
        SiteError: All servers were given up; with the last lines of each.
        ConfigurationError: The servers folder cannot be made.
    """
    files, told = files_of(plan), False
    await asyncio.to_thread(files.make)
    async with using(files):
        while not orders.stop.is_set():
            lock = await asyncio.to_thread(HostLock.patiently, files)
            if lock is not None:
                await keep(plan, lock, orders)
                return
            if not told:
                who = await asyncio.to_thread(holder, files)
                orders.say(f"{plan.host}: is served already, by {who}; standing by")
                told = True
            await _happens(orders.stop, _STANDBY_S)


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
        elif loop.time() - used >= linger_s and users.shut_out():
            orders.say(f"nobody has used the servers for {linger_s:g} s")
            orders.stop.set()
            return
        await asyncio.sleep(min(_LOOK_S, max(0.05, linger_s / 4)))


async def _happens(event: asyncio.Event, timeout_s: float) -> None:
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait({waiting}, timeout=timeout_s)
    waiting.cancel()
