from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fanfold.nodes.shard.gate import Gate, TurnLock


class GateMachine(RuleBasedStateMachine):
    """Random interleavings of entering, leaving, cancelling and closing."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.waiting: list[asyncio.Task[bool]] = []
        self.inside = 0

    @initialize(streams=st.integers(1, 3))
    def begin(self, streams: int) -> None:
        self.streams = streams
        self.gate = Gate(streams, drain_s=60.0)

    def run(self, what: Any = None) -> Any:
        return self.loop.run_until_complete(what if what is not None else asyncio.sleep(0))

    @rule(settle=st.booleans())
    def enter(self, settle: bool) -> None:
        self.waiting.append(self.loop.create_task(self.gate.acquire()))
        if settle:
            self.run()

    @precondition(lambda self: self.inside)
    @rule(settle=st.booleans())
    def leave(self, settle: bool) -> None:
        self.inside -= 1
        self.gate.release()
        if settle:
            self.run()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), settle=st.booleans())
    def cancel(self, data: st.DataObject, settle: bool) -> None:
        data.draw(st.sampled_from(self.waiting)).cancel()
        if settle:
            self.run()

    @rule(settle=st.booleans())
    def close(self, settle: bool) -> None:
        self.gate.close("test")
        if settle:
            self.run()

    @rule()
    def settle(self) -> None:
        self.run()

    @invariant()
    def count(self) -> None:
        for task in [t for t in self.waiting if t.done()]:
            self.waiting.remove(task)
            if not task.cancelled() and task.result():
                self.inside += 1
        assert 0 <= self.inside <= self.gate.in_flight <= self.streams

    def teardown(self) -> None:
        for _ in range(5):
            self.run()
        self.count()
        if self.gate.is_closed:
            assert not self.waiting  # nobody is left hanging
        while self.waiting or self.inside:
            while self.inside:
                self.leave(settle=False)
            for _ in range(3):
                self.run()
            self.count()
        assert self.gate.in_flight == 0  # no place has leaked
        self.gate.close("end")
        assert self.run(self.gate.wait_drained())
        if not self.gate.is_closed:
            entered = [self.loop.create_task(self.gate.acquire()) for _ in range(self.streams)]
            assert all(self.run(asyncio.gather(*entered)))
        self.loop.close()


TestGate = GateMachine.TestCase
TestGate.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


async def test_places_go_to_who_waits_longest() -> None:
    gate, order = Gate(1, 60.0), list[int]()

    async def user(number: int) -> None:
        assert await gate.acquire()
        order.append(number)
        await asyncio.sleep(0)
        gate.release()

    await asyncio.gather(*(user(n) for n in range(20)))
    assert order == list(range(20))


async def test_places_go_to_the_lowest_turn() -> None:
    gate, order = Gate(1, 60.0), list[int]()

    async def user(turn: int) -> None:
        assert await gate.acquire(turn)
        order.append(turn)
        await asyncio.sleep(0)
        gate.release()

    await asyncio.gather(*(user(turn) for turn in (9, 4, 7, 4, 0, 2)))
    assert order == [9, 0, 2, 4, 4, 7]  # the first one found the gate free


async def test_a_place_handed_over_counts_until_the_gate_is_closed() -> None:
    """Closed between the handing over and the waking up: nobody begins, and nobody is missed."""
    gate = Gate(1, 60.0)
    assert await gate.acquire()
    second = asyncio.create_task(gate.acquire())
    await asyncio.sleep(0)
    gate.release()
    assert gate.in_flight == 1
    gate.close("stop")
    assert not await second
    assert gate.in_flight == 0
    assert await gate.wait_drained()


async def test_the_first_reason_stays() -> None:
    gate, error = Gate(1, 60.0), ValueError("first")
    gate.close("first", error)
    gate.close("second")
    assert (gate.reason, gate.error, await gate.acquire()) == ("first", error, False)


async def test_waiting_for_the_drain_is_bounded_from_the_closing() -> None:
    gate = Gate(2, 0.0)
    assert await gate.acquire()
    gate.close("stop")
    assert not await gate.wait_drained()
    assert not await gate.wait_drained()
    gate.release()
    assert await gate.wait_drained()


async def test_waiting_for_the_closing() -> None:
    gate = Gate(1, 0.0)
    assert not await gate.wait_closed(0.0)
    waiting = asyncio.create_task(gate.wait_closed(60.0))
    await asyncio.sleep(0)
    gate.close("stop")
    assert await waiting


async def test_hurrying_ends_the_wait() -> None:
    gate = Gate(1, 60.0)
    assert await gate.acquire()
    gate.close("stop")
    waiting = asyncio.create_task(gate.wait_drained())
    await asyncio.sleep(0)
    assert not waiting.done()
    gate.stop_waiting()
    assert not await waiting
    gate.release()
    assert await gate.wait_drained()


async def test_turns_are_taken_by_the_lowest_number_that_waits() -> None:
    lock, taken = TurnLock(), list[int]()

    async def shard(turn: int) -> None:
        async with lock.take(turn):
            taken.append(turn)
            await asyncio.sleep(0)

    shards = [asyncio.create_task(shard(turn)) for turn in (5, 9, 3, 7, 1)]
    await asyncio.sleep(0)
    shards[3].cancel()
    await asyncio.gather(*shards, return_exceptions=True)
    assert taken == [5, 1, 3, 9]
    async with asyncio.timeout(60):
        await shard(2)


async def test_a_turn_that_is_cancelled_when_it_comes_is_handed_on() -> None:
    lock = TurnLock()

    async def shard(turn: int) -> int:
        async with lock.take(turn):
            return turn

    async with lock.take(0):
        first, second = (asyncio.create_task(shard(turn)) for turn in (1, 2))
        await asyncio.sleep(0)
    first.cancel()
    assert await second == 2
    assert first.cancelled()
