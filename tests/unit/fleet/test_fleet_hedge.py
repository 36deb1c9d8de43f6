"""Hedging: second requests at the end of a run, and what they reserve."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from fanfold.backends.budget.reservations import BudgetBalance, ItemAccount
from fanfold.backends.core.money import NO_PRICES, Amount, BudgetLimits
from fanfold.backends.core.protocols import CallLog
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.balancer import LoadBalancer
from fanfold.backends.fleet.endpoint import Endpoint, EndpointSpec
from fanfold.backends.fleet.policy import HedgePolicy
from fanfold.backends.fleet.request import RequestCharge, max_usage
from fanfold.backends.fleet.retry import Hedger, SendResult

BODY: dict[str, Any] = {"messages": []}
LONG = {"messages": [{"role": "user", "content": "x" * 900}], "max_tokens": 48}


class Line:
    """Answers when told to."""

    def __init__(self) -> None:
        self.endpoints = [Endpoint(EndpointSpec(f"http://n{i}:1")) for i in range(3)]
        self.dispatch = LoadBalancer(self.endpoints, 99, lambda *_: None, lambda: None)
        self.held: dict[Endpoint, asyncio.Future[SendResult]] = {}

    async def send(
        self, endpoint: Endpoint, _: Mapping[str, Any], charge: RequestCharge
    ) -> tuple[SendResult, Endpoint]:
        charge.record_sent(endpoint)
        self.held[endpoint] = asyncio.get_running_loop().create_future()
        try:
            return await self.held[endpoint], endpoint
        finally:
            self.dispatch.release(endpoint)


async def test_a_second_request_that_never_began_gives_its_endpoint_back() -> None:
    line = Line()
    hedger = Hedger(HedgePolicy(), line.dispatch, line.send)
    endpoint = await line.dispatch.acquire()
    task = asyncio.create_task(hedger.send(endpoint, BODY, RequestCharge(None, BODY)))
    await asyncio.sleep(0)
    (call,) = hedger._calls
    hedger._hedge(call, 0.0)
    hedger._remove_call(call)
    hedger._calls[call] = None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(line.held) == 1
    assert line.dispatch.in_flight == 0


async def test_the_first_good_answer_counts_and_the_other_is_let_go() -> None:
    line = Line()
    hedger = Hedger(HedgePolicy(), line.dispatch, line.send)
    endpoint = await line.dispatch.acquire()
    task = asyncio.create_task(hedger.send(endpoint, BODY, RequestCharge(None, BODY)))
    await asyncio.sleep(0)
    (call,) = hedger._calls
    hedger._hedge(call, 0.0)
    await asyncio.sleep(0)
    (other,) = line.held.keys() - {endpoint}
    line.held[other].set_result({"answer": 2})
    assert await task == ({"answer": 2}, other)
    assert line.held[endpoint].cancelled()
    assert line.dispatch.in_flight == 0


async def test_what_a_late_second_request_may_cost_is_known_at_once() -> None:
    """The item may be recorded before the request's task hears that it is cancelled."""
    line, log = Line(), CallLog()
    hedger = Hedger(HedgePolicy(), line.dispatch, line.send)
    endpoint = await line.dispatch.acquire()

    async def ask() -> int:
        await hedger.send(endpoint, BODY, RequestCharge(log, BODY))
        return log.lost.tokens

    task = asyncio.create_task(ask())
    await asyncio.sleep(0)
    (call,) = hedger._calls
    hedger._hedge(call, 0.0)
    await asyncio.sleep(0)
    (other,) = line.held.keys() - {endpoint}
    line.held[endpoint].set_result({"answer": 1})
    assert await task == max_usage(BODY).tokens
    assert log.usage_by_endpoint[other.label].lost == max_usage(BODY)
    assert other.stats.lost_prompt_tokens == max_usage(BODY).prompt
    assert (log.requests, log.usage_by_endpoint[endpoint.label].lost.tokens) == (2, 0)


@pytest.mark.parametrize("budgeted", [False, True])
@pytest.mark.parametrize("winner", ["first", "second"])
@pytest.mark.parametrize(
    ("usage", "lost"),
    [
        ({"prompt_tokens": 30, "completion_tokens": 5}, Usage(30, 48)),
        ({"prompt_tokens": 0, "completion_tokens": 1}, Usage(0, 48)),
        (None, max_usage(LONG)),
        ({"completion_tokens": 5}, max_usage(LONG)),
    ],
)
async def test_a_copy_is_charged_for_the_prompt_that_the_answer_reveals(
    budgeted: bool, winner: str, usage: dict[str, int] | None, lost: Usage
) -> None:
    """What the other copy has written by then is unknown: at most max_tokens."""
    line, balance = Line(), BudgetBalance(BudgetLimits(tokens=10**6), None, str)
    account = ItemAccount(balance, NO_PRICES, 0) if budgeted else None
    log = CallLog(account=account)
    hedger = Hedger(HedgePolicy(), line.dispatch, line.send)
    endpoint = await line.dispatch.acquire()
    charge = await RequestCharge.reserve(log, LONG)
    task = asyncio.create_task(hedger.send(endpoint, LONG, charge))
    await asyncio.sleep(0)
    (call,) = hedger._calls
    hedger._hedge(call, 0.0)
    await asyncio.sleep(0)
    (other,) = line.held.keys() - {endpoint}
    charges = {endpoint: charge, other: next(iter(call.hedges.values()))[1]}
    won, left = (endpoint, other) if winner == "first" else (other, endpoint)
    charges[won].settle_answered(Usage(0, 0), None)  # as the sender does before it returns
    line.held[won].set_result({} if usage is None else {"usage": usage})
    await task
    if winner == "second":
        charges[left].settle_lost()  # as the sender does when its task is cancelled
    assert log.lost == lost
    if account is not None:
        assert balance.settled == Amount(2, lost.tokens)
