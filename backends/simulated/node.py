"""One node: slots, a queue, and its counters."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from .accounting import NodeCounts
from .errors import ApiError


class Work(Protocol):
    """A request that a node works on."""

    def start(self) -> None:
        """Begin: a slot is free."""
        ...


class Node:
    """A model server with so many slots, first in, first out.

    Args:
        index: The node's number.
        slots: Requests worked on at once (``max_num_seqs``).
        queue_limit: Longest queue, or None.
        speed: Factor on the speed.
    """

    def __init__(self, index: int, slots: int, queue_limit: int | None, speed: float) -> None:
        self.index = index
        self.slots = slots
        self.speed = speed
        self.alive = True
        self.arrivals = 0
        """Completion requests since the start; unlike the counters, a reset keeps it."""
        self.counts = NodeCounts()
        self._queue_limit = queue_limit
        self._running: dict[Work, None] = {}
        self._waiting: deque[Work] = deque()

    @property
    def running(self) -> int:
        """Requests worked on."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests queued."""
        return len(self._waiting)

    @property
    def work(self) -> tuple[Work, ...]:
        """All requests, running ones first."""
        return (*self._running, *self._waiting)

    def admit(self, work: Work) -> None:
        """Take a request: start or queue it.

        Args:
            work: The request.

        Raises:
            ApiError: 503: the queue is full.
        """
        if len(self._running) < self.slots:
            self._start(work)
        elif self._queue_limit is not None and len(self._waiting) >= self._queue_limit:
            text = (
                "The engine is currently busy and cannot accept new requests: the limit of "
                f"{self._queue_limit} queued requests is reached. Please try again later."
            )
            raise ApiError(text, 503, "Service Unavailable")
        else:
            self._waiting.append(work)
            self.counts.waiting_max = max(self.counts.waiting_max, len(self._waiting))

    def release(self, work: Work) -> None:
        """Give back a request's slot or place in the queue, and start the next one.

        Args:
            work: The request, finished or left.
        """
        if work not in self._running:
            self._waiting.remove(work)
            return
        del self._running[work]
        if self._waiting:
            self._start(self._waiting.popleft())

    def _start(self, work: Work) -> None:
        self._running[work] = None
        self.counts.running_max = max(self.counts.running_max, len(self._running))
        work.start()
