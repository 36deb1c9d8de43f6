"""Parts of the run's rate limits, lent to worker processes through a file in the journal folder."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import orjson

from ...backends.core.messages import ShardTask
from ...backends.core.values import parse_json
from ...backends.discovery.connect import COORDINATOR_SHARE
from ...backends.fleet.rate_limit import RateLimiter
from ...configs.models import RunConfig
from .heartbeat import rates_file

logger = logging.getLogger(__name__)

RATE_LIMITS: Final = (
    "requests_per_s",
    "tokens_per_min",
    "endpoint_requests_per_s",
    "endpoint_tokens_per_min",
)
"""Settings in ``limits`` that are divided; the last two hold for each endpoint."""
_READ_S: Final = 2.0
_LOST_S: Final = 10.0
"""A worker that cannot read its share for so long uses the share that each worker has."""
_LAG_S: Final = _LOST_S + 5.0
"""A lowered share counts at its former height for so long, beyond the length of a window."""
_SETTLED_S: Final = 10.0
"""Shares grow when no worker has come or gone for so long."""
_LINGER_S: Final = 20.0
"""A worker without a task keeps its share for so long: it usually gets the next one."""
_LEAST: Final = 1e-9
_SECOND_S: Final = 1.0
_MINUTE_S: Final = 60.0


class RateLender:
    """Divides the rate limits of a run among its workers; pure, time is passed in.

    In any window the largest shares of all workers, added, are at most the total: a share that is
    lowered counts at its former height until every window has ended in which it may have been used.

    Args:
        base: Share of a worker while all that are configured work.
        window_s: Length of the longest window, in seconds.
        total: Sum of all shares; the rest is for the coordinator's own requests.
    """

    def __init__(self, base: float, window_s: float, total: float = 1.0) -> None:
        self._base, self._hold_s, self._total = base * total, window_s + _LAG_S, total
        self._shares: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._held: list[tuple[float, float]] = []
        self._changed_at = self._updated_at = 0.0

    def begin_run(self, now: float) -> None:
        """Continue after a pause in which no worker had a task.

        Args:
            now: Monotonic time in seconds.
        """
        if now - self._updated_at > self._hold_s:  # every window has ended in which they worked
            self._shares.clear()
        self._seen = dict.fromkeys(self._shares, now)  # the same workers usually come back

    def update(self, workers: Collection[str], now: float) -> Mapping[str, float]:
        """Return the share of each worker.

        Args:
            workers: Those that work on a task now.
            now: Monotonic time in seconds.
        """
        self._updated_at = now
        self._held = [(until, part) for until, part in self._held if until > now]
        self._seen |= dict.fromkeys(workers, now)
        for worker in [w for w, seen in self._seen.items() if now - seen > _LINGER_S]:
            del self._seen[worker]
            self._hold(self._shares.pop(worker), now)
            self._changed_at = now
        for worker in workers:
            if worker not in self._shares:
                self._shares[worker], self._changed_at = 0.0, now
        if self._shares:
            self._divide(now)
        return dict(self._shares)

    def _hold(self, part: float, now: float) -> None:
        if part > 0:
            self._held.append((now + self._hold_s, part))

    def _divide(self, now: float) -> None:
        fair = self._total / len(self._shares)
        settled = now - self._changed_at >= _SETTLED_S
        target = fair if settled else min(self._base, fair)
        for worker, share in self._shares.items():
            if share > fair + _LEAST:
                self._hold(share - fair, now)
                self._shares[worker] = fair
        free = self._total - sum(self._shares.values()) - sum(part for _, part in self._held)
        for worker in sorted(self._shares, key=self._shares.__getitem__):
            more = min(target - self._shares[worker], free)
            if more > _LEAST:
                self._shares[worker] += more
                free -= more


class RateFile:
    """Writes the shares of a session's workers for them to read.

    Args:
        journal: The journal folder that the workers share.
        token: Identifies the session.
        lender: Divides the limits.
    """

    def __init__(self, journal: Path, token: str, lender: RateLender) -> None:
        self._file, self._lender = rates_file(journal, token), lender
        self._written: Mapping[str, float] = {}
        self._failed = False
        lender.begin_run(time.monotonic())

    def update(self, workers: Collection[str]) -> None:
        """Divide the limits among the workers, and write their shares if they changed; blocks."""
        shares = self._lender.update(workers, time.monotonic())
        if shares == self._written:
            return
        new = self._file.with_name(f"{self._file.name}.new")
        try:
            new.write_bytes(orjson.dumps({"shares": dict(shares)}))
            os.replace(new, self._file)  # noqa: PTH105 - the pair of write_bytes
        except OSError as error:
            if not self._failed:
                logger.warning("%s: cannot be written (will retry): %s", new, error.strerror)
            self._failed = True
        else:
            self._written, self._failed = shares, False

    def remove(self) -> None:
        """Remove the file; blocks."""
        with suppress(OSError):
            self._file.unlink(missing_ok=True)


def make_rate_lender(config: RunConfig) -> RateLender | None:
    """Return what divides the rate limits among workers; None if they share no limit.

    Without it each worker keeps its share of all that are configured.
    """
    limits, backend, first = config.limits, config.backend, config.endpoints.first
    rates = RATE_LIMITS[:2] if backend.node_endpoints else RATE_LIMITS
    limited = (
        any(getattr(limits, name) is not None for name in rates)
        or first is not None
        or config.endpoints.auto
    )
    if not limited or backend.concurrent_shards == 1:
        return None
    behind = first is not None or config.endpoints.auto
    total = 1.0 - COORDINATOR_SHARE if behind else 1.0
    return RateLender(1.0 / backend.concurrent_shards, _find_window(config), total)


def _find_window(config: RunConfig) -> float:
    """Return the length in seconds of the longest window of the run's limits."""
    limits, first = config.limits, config.endpoints.first
    windows = [_SECOND_S]
    if first is not None:
        windows.append(first.window_s)
    if limits.tokens_per_min or limits.endpoint_tokens_per_min or config.endpoints.auto:
        windows.append(_MINUTE_S)
    return max(windows)


@asynccontextmanager
async def follow_share(task: ShardTask, limiter: RateLimiter, worker: str) -> AsyncIterator[None]:
    """Keep to this worker's share of the rate limits while the block runs.

    Args:
        task: The task.
        limiter: The quotas of this process.
        worker: This worker's name.
    """
    if task.journal is None or "token" not in task.run or not limiter.has_quota:
        yield
        return
    file = rates_file(Path(task.journal), task.run["token"])
    shares = await asyncio.to_thread(_read_shares, file)
    if shares is None:  # the share of an earlier run says nothing about this one
        limiter.set_share(min(limiter.base_share, limiter.share or limiter.base_share))
    elif worker not in shares:
        limiter.set_share(0.0)  # until the coordinator has seen this worker, which takes seconds
    following = asyncio.create_task(_follow(file, limiter, worker))
    try:
        yield
    finally:
        following.cancel()
        await asyncio.wait({following})


async def _follow(file: Path, limiter: RateLimiter, worker: str) -> None:
    heard_at = time.monotonic()
    while True:
        await asyncio.sleep(_READ_S)
        shares = await asyncio.to_thread(_read_shares, file)
        if shares is not None and worker in shares:
            heard_at = time.monotonic()
            limiter.set_share(shares[worker])
        elif time.monotonic() - heard_at > _LOST_S:
            limiter.set_share(min(limiter.base_share, limiter.share or limiter.base_share))


def _read_shares(file: Path) -> dict[str, float] | None:
    """Return the shares of workers by name; None if they cannot be read; blocks."""
    try:
        shares = parse_json(file.read_bytes())["shares"]
        return {str(name): min(1.0, max(0.0, float(share))) for name, share in shares.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
