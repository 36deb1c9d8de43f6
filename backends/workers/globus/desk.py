"""A run's desk for Globus Compute: orders out in few requests, their summaries home.

All endpoints of a run share one desk, hence one login, one rate and one loop that asks after
tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ...core.errors import FanfoldError, SiteError
from ...core.types import Json
from .line import Talk
from .pace import Pace
from .poller import ASKED, Answer, Asking, settle
from .service import MOST_BYTES, Parcel, Service, WorkShard, packed
from .tasks import TaskList

_CLOSED: Final = "globus_compute: closed"
_UNPOSTED: Final = "globus_compute: the order was not posted"


@dataclass(frozen=True, slots=True)
class Letter:
    """An order that waits to be posted.

    Attributes:
        endpoint: Whom to.
        shard: The shard's name.
        deadline_s: Seconds that a worker may take for it.
        parcel: The order, packed.
        answer: Awaits the summary.
    """

    endpoint: str
    shard: str
    deadline_s: float
    parcel: Parcel
    answer: Answer


class Desk:
    """Posts orders and brings their summaries home.

    Args:
        connect: Makes the service; blocks.
        work: What runs on the endpoints.
        function: Id of its registration; None registers it when the desk opens.
        tasks: Remembers what was posted.
        pace: How often the service is asked.

    Attributes:
        asking: Who asks after tasks and endpoints.
        tasks: Remembers what was posted.
        pace: How often the service is asked.
    """

    def __init__(
        self,
        connect: Callable[[], Service],
        work: WorkShard,
        function: str | None,
        tasks: TaskList,
        pace: Pace = Pace(),  # noqa: B008 - frozen
    ) -> None:
        self._work, self._function, self.pace = work, function, pace
        self._talk = Talk(connect, pace)
        self.asking, self.tasks = Asking(self._talk, pace), tasks
        self._opening, self._users = asyncio.Lock(), 0
        self._group: str | None = None
        self._letters: list[Letter] = []
        self._posting: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, once for all who use it.

        Raises:
            FanfoldError: There is no login, or the service refused or did not answer.
            LedgerError: The list of an earlier coordinator's tasks is damaged.
        """
        async with self._opening:
            if self._users == 0:
                await self._connect()
            self._users += 1

    async def _connect(self) -> None:
        await self.tasks.read()
        await self._talk.open()
        if self._function is None:
            try:
                self._function = await self._talk.ask(lambda service: service.register(self._work))
            except FanfoldError:
                await self._talk.close()
                raise

    async def close(self) -> None:
        """Leave; the last of those who use it closes it. Tasks go on at their endpoints."""
        self._users -= 1
        if self._users > 0:
            return
        posting, self._posting = self._posting, None
        if posting is not None:
            posting.cancel()
            await asyncio.wait({posting})
        for letter in self._letters:
            settle(letter.answer, SiteError(_CLOSED))
        self._letters = []
        await self.asking.close()
        await self._talk.close()
        await self.tasks.write_rest()

    async def submit(self, endpoint: str, order: dict[str, Json]) -> dict[str, Json]:
        """Have one order worked on.

        Raises:
            WorkerLostError: Its endpoint went offline, or its task failed.
            SiteError: It could not be posted.
            ConfigurationError: It never can be.
            RunStoppedError: Its result cannot be carried.
        """
        parcel = await asyncio.to_thread(packed, order)
        answer: Answer = asyncio.get_running_loop().create_future()
        seconds = order.get("deadline_s")
        deadline_s = float(seconds) if isinstance(seconds, int | float) else 0.0
        letter = Letter(endpoint, str(order.get("shard")), deadline_s, parcel, answer)
        self._letters.append(letter)
        if self._posting is None or self._posting.done():
            self._posting = asyncio.create_task(self._post_all())
        return await answer

    async def _post_all(self) -> None:
        while batch := self._next_batch():
            failed: FanfoldError | None = SiteError(_UNPOSTED)
            try:
                await self._post(batch)
                failed = None
            except FanfoldError as error:  # theirs alone: later ones are tried anew
                failed = error
            except asyncio.CancelledError:
                failed = SiteError(_CLOSED)
                raise
            finally:  # whatever happened, nobody waits for a letter that was not posted
                if failed is not None:
                    for letter in batch:
                        settle(letter.answer, failed)

    def _next_batch(self) -> list[Letter]:
        """Take letters to one endpoint, as many as one request may carry."""
        batch, kept, size = list[Letter](), list[Letter](), 0
        for letter in self._letters:
            if letter.answer.done():
                continue
            same = not batch or letter.endpoint == batch[0].endpoint
            if same and size + letter.parcel.size <= MOST_BYTES and len(batch) < ASKED:
                batch.append(letter)
                size += letter.parcel.size
            else:
                kept.append(letter)
        self._letters = kept
        return batch

    async def _post(self, batch: list[Letter]) -> None:
        endpoint, function, group = batch[0].endpoint, self._function or "", self._group
        parcels = [letter.parcel for letter in batch]
        posted = await self._talk.ask(lambda s: s.post(endpoint, function, parcels, group))
        self._group = posted.group
        pairs = list(zip(batch, posted.tasks, strict=True))
        await self.tasks.posted(
            endpoint, posted.group, [(x.shard, task, x.deadline_s) for x, task in pairs]
        )
        for letter, task in pairs:
            self.tasks.close_after(letter.answer, letter.shard)
            self.asking.follow(task, endpoint, letter.answer, letter.deadline_s)
