"""The worker's side of a shard: an importable function, JSON in and JSON out.

Executors ship :func:`work_shard` by reference, so fanfold must be installed where workers run.
A worker process keeps one event loop and its fleet's connections from order to order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, TypeVar

import orjson

from ..backends.core.errors import FanfoldError, SiteError
from ..backends.core.messages import Order, Summary, own_version
from ..backends.core.types import Json, Shard
from ..nodes.shard.local import finish_some
from .errand import Bag, errand
from .remote.heartbeat import attending
from .remote.tasks import leased, out_of_lease, too_late, used_of

T = TypeVar("T")

logger = logging.getLogger(__name__)

_CLOSE_S: Final = 5.0


def work_shard(order: dict[str, Json]) -> dict[str, Json]:
    """Work on one order and return its summary; for executors.

    It never raises for an item, and says as data what kept it from its work.
    """
    worker = the_worker()
    return worker.run(answer(order, worker.bag))


class Worker:
    """An event loop in a thread of its own, and what orders have in common."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.bag = Bag()
        threading.Thread(target=self._loop.run_forever, name="fanfold", daemon=True).start()
        # Before the interpreter ends its thread pools, which closing needs; ``atexit`` is too late.
        threading._register_atexit(self.close)  # type: ignore[attr-defined]  # noqa: SLF001

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the worker's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Close what is kept between orders, unless the loop hangs."""
        closing = asyncio.run_coroutine_threadsafe(self.bag.aclose(), self._loop)
        try:
            closing.result(_CLOSE_S)
        except TimeoutError:
            logger.warning("%s: the event loop hangs; its connections are not closed", whoami())


@lru_cache(maxsize=1)
def the_worker() -> Worker:
    """Return this process's worker: the one thing that a process keeps."""
    return Worker()


async def answer(order: Mapping[str, Json], bag: Bag) -> dict[str, Json]:
    """Work on one order in the running loop; the door for workers that are async themselves."""
    try:
        read = Order.from_json(order)
        _check_version(read)
        return (await _work(read, bag)).to_json()
    except FanfoldError as error:
        return _refused(order, error).to_json()


def _check_version(order: Order) -> None:
    if order.fanfold != own_version():
        msg = (
            f"this worker runs fanfold {own_version()}, its coordinator {order.fanfold}; "
            "install the same version on both"
        )
        raise SiteError(msg)


async def _work(order: Order, bag: Bag) -> Summary:
    began = time.monotonic()
    async with (
        attending(order) as stop,
        bag.parts(order, whoami()) as parts,
        leased(order, parts.loaded.config) as budget,
    ):
        job, late = errand(order, parts, stop, budget), too_late(order)
        drain = (lambda: late) if late else job.drain
        part = await finish_some(Shard(0, len(order.items)), job.tools, drain)
        gate, used = job.tools.gate, used_of(budget)
        summary = Summary(
            shard=order.shard,
            attempt=order.attempt,
            fanfold=own_version(),
            worker=whoami(),
            tally=part.tally,
            stopped=gate.reason,
            parts=None if job.ledger.altered else part.state(),
            records=job.ledger.sent,
            error=None if gate.error is None or out_of_lease(gate.error) else as_data(gate.error),
            seconds=time.monotonic() - began,
            endpoints=parts.teller.news(),
            lease=None if order.lease is None else order.lease["name"],
            used=None if used is None else used.to_json(),
            short=gate.error is not None and out_of_lease(gate.error),
        )
        return await asyncio.to_thread(_carried, summary, order.carry)


def _carried(summary: Summary, carry: int) -> Summary:
    """Leave out the part of the aggregate if it is too large; it can be folded from the records."""
    if summary.parts is None or len(orjson.dumps(summary.parts)) < carry:
        return summary
    return replace(summary, parts=None)


def _refused(order: Any, error: FanfoldError) -> Summary:
    said = order if isinstance(order, Mapping) else {}
    return Summary(
        shard=str(said.get("shard")),
        attempt=int(said.get("attempt") or 0),
        fanfold=own_version(),
        worker=whoami(),
        error=as_data(error),
    )


def as_data(error: Exception) -> dict[str, str]:
    """Return an error's class and text."""
    return {"class": type(error).__name__, "text": str(error)}


def whoami() -> str:
    """Return host and process."""
    return f"{socket.gethostname()}:{os.getpid()}"
