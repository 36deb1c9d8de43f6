"""When a task counts as lost, by a clock that the test sets."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from fanfold.backends.workers import member as module
from fanfold.backends.workers.member import InFlightTask, PoolPolicy


@pytest.mark.parametrize(("ahead", "patience"), [(1, 5.0), (2, 105.0)])
async def test_an_order_may_wait_for_the_one_before_it(
    monkeypatch: pytest.MonkeyPatch, ahead: int, patience: float
) -> None:
    """That one may take its whole deadline, however short queues are; and each answer is one."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    policy = PoolPolicy(queue_s=5.0, deadline_s=100.0, tasks_per_worker=ahead)
    answer = asyncio.get_running_loop().create_future()
    task = InFlightTask("s", answer, policy, lambda: None, lambda _: None)
    clock.now += patience
    assert task.lost_reason(None) is None
    answered_at = clock.now
    clock.now += patience
    assert task.lost_reason(answered_at) is None
    clock.now += 1.0
    assert "not started" in (task.lost_reason(answered_at) or "")
    task.cancel()
