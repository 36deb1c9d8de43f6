"""The life of one server: started, ready, watched, restarted, given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..core.errors import SiteError
from .events import Record
from .guard import Guard
from .look import is_taken, look
from .plan import NodePlan, ServerPlan, files_of
from .process import ServerProcess

_LONGEST_PAUSE_S: Final = 30.0
_FIRST_LOOK_S: Final = 0.1
_HTTP: Final = "HTTP "
_LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Desk:
    """What all servers of a node share.

    Attributes:
        plan: The node's plan.
        guard: What ends them if this process is killed.
        record: Where their lives are noted.
        say: Tells the user something.
        changed: Called when a server is ready, or is no more.
        hurry: Set when nothing is waited for any more.
    """

    plan: NodePlan
    guard: Guard
    record: Record
    say: Callable[[str], None]
    changed: Callable[[], None]
    hurry: asyncio.Event


@dataclass(frozen=True, slots=True)
class _End:
    """How one start of a server ended.

    Attributes:
        why: In words.
        lines: What it said last.
        ready: Whether it had been ready.
    """

    why: str
    lines: list[str]
    ready: bool


class Server:
    """One server.

    Args:
        plan: What it is.
        desk: What all servers of the node share.

    Attributes:
        plan: As given.
        name: ``address:port``.
        ready: Whether its endpoint is to be listed.
        starts: How often it was started.
        given_up: Why it is not started again, with its last lines; or None.
    """

    def __init__(self, plan: ServerPlan, desk: Desk) -> None:
        self.plan, self._desk = plan, desk
        self.name = desk.plan.named(plan)
        self.ready = False
        self.starts = 0
        self.given_up: str | None = None

    async def live(self) -> None:
        """Keep it up until it is given up; cancelled, it ends the process first.

        One that fails before it was ever ready is given up at once: most often its command is
        wrong.
        """
        restarts, once, most = 0, False, self._desk.plan.restarts
        while True:
            end = await self._lived(restarts)
            once = once or end.ready
            if not once or restarts >= most:
                self._give_up(end, restarts)
                return
            restarts += 1
            self._desk.say(f"{self.name} {end.why}; restart {restarts} of {most}")
            pause = self._desk.plan.watching.pause_s * 2.0 ** (restarts - 1)
            await asyncio.sleep(min(_LONGEST_PAUSE_S, pause))

    async def _lived(self, restart: int) -> _End:
        """Start it, and return when it is down again."""
        desk, began = self._desk, time.monotonic()
        if await self._port_is_taken():
            why = f"cannot be started: another process listens on port {self.plan.port}"
            return _End(why, [], ready=False)
        try:
            log = files_of(desk.plan).log(self.plan.instance)
            process = await ServerProcess.start(self.plan, desk.guard, log)
        except SiteError as error:
            return _End(f"cannot be started: {error.message}", [], ready=False)
        self.starts += 1
        self._note("start", port=self.plan.port, pid=process.pid, restart=restart)
        try:
            failed = await self._comes_up(process, began)
            why = failed or await self._stays_up(process, began)
        finally:
            self._off()
            await process.stop(desk.plan.watching.stop_s, desk.hurry)
        return _End(why, await asyncio.to_thread(process.last_lines), failed is None)

    async def _port_is_taken(self) -> bool:
        port, wait_s = self.plan.port, self._desk.plan.watching.answer_s
        for address in dict.fromkeys((_LOOPBACK, self._desk.plan.address)):
            if await is_taken(address, port, wait_s):
                return True
        return False

    async def _comes_up(self, process: ServerProcess, began: float) -> str | None:
        """Wait until it is ready; return None, or why it will not be."""
        plan, pause, odd = self._desk.plan, _FIRST_LOOK_S, ""
        ended = asyncio.ensure_future(process.ended())
        try:
            while not ended.done():
                wrong = await self._look()
                if wrong is None and not ended.done():
                    return None
                if wrong and wrong.startswith(_HTTP) and wrong != odd:
                    odd = wrong
                    self._desk.say(f"{self.name} answers {plan.ready} with {wrong}; still waiting")
                if time.monotonic() - began > plan.timeout_s:
                    return (
                        f"was not ready after {plan.timeout_s:g} s: {plan.ready}: {wrong} (does "
                        f"it listen on {plan.address}?)"
                    )
                await asyncio.wait({ended}, timeout=pause)
                pause = min(plan.watching.every_s, 1.5 * pause)
            return f"{ended.result()} before it was ready"
        finally:
            ended.cancel()

    async def _stays_up(self, process: ServerProcess, began: float) -> str:
        """Watch it while it is ready; return why it is no more."""
        up, seconds = time.monotonic(), round(time.monotonic() - began, 3)
        self._note("ready", seconds=seconds)
        self._on(f"{self.name} is ready after {seconds:.1f} s")
        ended = asyncio.ensure_future(process.ended())
        try:
            why = await self._watched(ended)
        finally:
            ended.cancel()
        self._note("down", why=why, seconds=round(time.monotonic() - up, 3))
        return why

    async def _watched(self, ended: asyncio.Future[str]) -> str:
        watching, silent_since = self._desk.plan.watching, None
        while True:
            await asyncio.wait({ended}, timeout=watching.every_s)
            if ended.done():
                return ended.result()
            asked = time.monotonic()
            wrong = await self._look()
            if wrong is None:
                silent_since = None
                if not self.ready:
                    self._note("back")
                    self._on(f"{self.name} answers again")
                continue
            silent_since = silent_since or asked
            silent = time.monotonic() - silent_since
            if silent >= watching.dead_s:
                return f"does not answer any more ({wrong})"
            if silent >= watching.out_s and self.ready:
                self._note("out", why=wrong)
                self._desk.say(f"{self.name} does not answer ({wrong}); it is taken out")
                self._off()

    async def _look(self) -> str | None:
        plan = self._desk.plan
        wait_s = plan.watching.answer_s
        return await look(plan.address, self.plan.port, plan.ready, wait_s, plan.key)

    def _on(self, text: str) -> None:
        self.ready = True
        self._desk.say(text)
        self._desk.changed()

    def _off(self) -> None:
        if self.ready:
            self.ready = False
            self._desk.changed()

    def _give_up(self, end: _End, restarts: int) -> None:
        times = f" after {restarts} restarts" if restarts else ""
        lines = [f"{self.name} {end.why}; it is given up{times}"]
        if end.lines:
            log = files_of(self._desk.plan).log(self.plan.instance)
            lines.append(f"  its last words, from {log}:")
            lines += [f"  | {line}" for line in end.lines]
        self.given_up = "\n".join(lines)
        self._note("given_up", why=end.why)

    def _note(self, event: str, **what: object) -> None:
        self._desk.record.note(event, instance=self.plan.instance, **what)
