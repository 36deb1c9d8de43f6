"""What a worker hears of its order's coordinator, and lets it see, while it works."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from ...backends.cluster.walltime import Walltime, walltime
from ...backends.core.messages import REPEATED, WALLTIME, Order
from ...configs.models import LimitsConfig
from .heartbeat import beat_file

logger = logging.getLogger(__name__)

STOPPED: Final = "the coordinator stopped the run"
WITHDRAWN: Final = "the coordinator has taken the order back"
TIME_OVER: Final = f"{WALLTIME}: the run's time is over"
_STOP_S: Final = 1.0
_BEAT_S: Final = 2.0
"""Seconds between a worker's signs of life."""


class StopSign:
    """An order's deadline, and whether its coordinator stops all workers.

    Args:
        deadline_s: Seconds from now until no further item begins.
        ends_at: When the run's time is over, in seconds since 1970, or None.

    Attributes:
        stopped: Whether the coordinator has stopped the run.
        withdrawn: Whether it has taken the order back: this worker was silent for too long.
        repeated: Whether the order was begun before, here or elsewhere.
    """

    def __init__(self, deadline_s: float, ends_at: float | None = None) -> None:
        self._deadline, self._ends_at = time.monotonic() + deadline_s, ends_at
        self._own: Walltime | None = None
        self.stopped = self.withdrawn = self.repeated = False

    def reason(self) -> str | None:
        """Tell why no further item shall begin, or None."""
        if self.stopped:
            return STOPPED
        if self.withdrawn:
            return WITHDRAWN
        if self.repeated:
            return REPEATED
        if self._ends_at is not None and time.time() > self._ends_at:
            return TIME_OVER
        if self._own is not None and not self._own.left():
            return self._own.reason
        return "the order's deadline" if time.monotonic() > self._deadline else None

    def heed(self, limits: LimitsConfig, environment: Mapping[str, str]) -> None:
        """Stop also before this worker's own batch job ends.

        Raises:
            ConfigurationError: What the environment says of the end is no time.
        """
        self._own = walltime(
            limits.model_copy(update={"walltime_s": None}), environment, time.time()
        )


@asynccontextmanager
async def attending(order: Order) -> AsyncIterator[StopSign]:
    """Look for the coordinator's stop, and give signs of life, while the block runs.

    The event loop does both: a worker whose loop hangs gives no sign of life.
    """
    sign = StopSign(order.deadline_s, order.ends_at)
    tasks = list[asyncio.Task[None]]()
    try:
        if order.stop_file is not None:
            tasks.append(asyncio.create_task(_look(Path(order.stop_file), sign)))
        if order.journal is not None and "token" in order.run:
            file = beat_file(Path(order.journal), order.run["token"], order.shard, order.attempt)
            await _heed(_begin, file, sign)
            tasks.append(asyncio.create_task(_beat_on(file, sign)))
        yield sign
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _beat_on(file: Path, sign: StopSign) -> None:
    while not sign.withdrawn:
        await asyncio.sleep(_BEAT_S)
        await _heed(_touch, file, sign)


async def _heed(do: Callable[[Path, StopSign], None], file: Path, sign: StopSign) -> None:
    """Give a sign of life; the coordinator has made the file, and takes it away with the order."""
    try:
        await asyncio.to_thread(do, file, sign)
    except FileNotFoundError:
        sign.withdrawn = True
    except OSError as error:  # it may be well again before the coordinator's patience ends
        logger.warning("%s: cannot be touched: %s", file, error.strerror)


def _begin(file: Path, sign: StopSign) -> None:
    """Note that the order is begun; engines may deliver it again, however much of it is done."""
    with file.open("r+b") as opened:
        sign.repeated = bool(opened.read(1))
        if not sign.repeated:
            opened.write(b"begun\n")


def _touch(file: Path, _: StopSign) -> None:
    os.utime(file)


async def _look(file: Path, sign: StopSign) -> None:
    while not sign.stopped:
        try:
            sign.stopped = await asyncio.to_thread(file.exists)
        except OSError as error:
            logger.warning("%s: cannot be looked for: %s", file, error.strerror)
        await asyncio.sleep(_STOP_S)
