"""When a task counts as lost, by a clock that the test sets."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from fanfold.backends.workers import member as module
from fanfold.backends.workers.member import PoolPolicy, TaskTimeout


@dataclass
class Place:
    answered_at: float | None = None


@pytest.mark.parametrize(("ahead", "patience"), [(1, 5.0), (2, 105.0)])
def test_an_order_may_wait_for_the_one_before_it(
    monkeypatch: pytest.MonkeyPatch, ahead: int, patience: float
) -> None:
    """That one may take its whole deadline, however short queues are; and each answer is one."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    place = Place()
    policy = PoolPolicy(queue_s=5.0, deadline_s=100.0, tasks_per_worker=ahead)
    watch = TaskTimeout(policy, lambda: None, place)
    clock.now += patience
    assert watch.lost_reason() is None
    place.answered_at = clock.now
    clock.now += patience
    assert watch.lost_reason() is None
    clock.now += 1.0
    assert "not started" in (watch.lost_reason() or "")
