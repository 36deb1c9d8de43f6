"""What a lost request is charged with: the answer to a retry reveals the prompt's tokens."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from fanfold.backends.budget.reservations import BudgetBalance, ItemAccount
from fanfold.backends.core.errors import BudgetExhaustedError, EndpointError
from fanfold.backends.core.money import NO_PRICES, BudgetLimits
from fanfold.backends.core.protocols import CURRENT_CALLS, CallLog
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.langchain import ChatFleet
from fanfold.backends.fleet.policy import (
    BreakerPolicy,
    FleetPolicy,
    ModelParams,
    RetryPolicy,
    TimeoutPolicy,
)
from fanfold.backends.fleet.request import max_usage

from .conftest import Canned, Stub, completion, until

pytestmark = pytest.mark.integration

POLICY = FleetPolicy(
    retry=RetryPolicy(attempts=4, backoff_s=0.01),
    timeout=TimeoutPolicy(request_s=1.0, fleet_s=5.0),
    breaker=BreakerPolicy(open_s=0.02, open_max_s=0.1),
)
BODY: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "x" * 900}],
    "max_tokens": 48,
}
MOST = max_usage(BODY)
GOOD = Canned(200, completion("a"))
NO_USAGE = Canned(200, completion("a") | {"usage": None})
DROPPED, SILENT = Canned(200, None), Canned(200, completion("late"), held=True)
LOST_ANSWERS = {
    "dropped": DROPPED,
    "timed out": SILENT,
    "408": Canned(408, {"error": {"message": "slow"}}),
    "502": Canned(502, b"<html>bad gateway</html>"),
    "504": Canned(504, b"upstream timed out"),
    "not JSON": Canned(200, b'{"choices": ['),
}


def open_log(*, budgeted: bool) -> tuple[CallLog, BudgetBalance]:
    balance = BudgetBalance(BudgetLimits(tokens=10**6), None, str)
    log = CallLog(account=ItemAccount(balance, NO_PRICES, 0) if budgeted else None)
    CURRENT_CALLS.set(log)
    return log, balance


def check(log: CallLog, balance: BudgetBalance, fleet: Fleet, lost: Usage) -> None:
    """Check that item, endpoint and budget agree on what was lost."""
    assert log.lost == lost
    assert not log.sent
    (usage,) = log.usage_by_endpoint.values()
    assert usage.lost == lost
    (report,) = fleet.report()
    assert (report.lost_prompt_tokens, report.lost_completion_tokens) == (
        lost.prompt or 0,
        lost.completion or 0,
    )
    if log.account is not None:
        log.account.close()
        answered = balance.settled.tokens - lost.tokens
        if log.usage.prompt is not None:
            assert answered == log.usage.tokens
        else:  # the most that an answer without counts may have used, or none came
            assert 0 <= answered <= MOST.tokens
        assert balance.settled.requests == log.requests
        assert not any(balance.reserved)


@pytest.mark.parametrize("budgeted", [False, True])
@pytest.mark.parametrize("lost", list(LOST_ANSWERS))
async def test_the_answer_to_a_retry_tells_the_prompt_of_a_lost_request(
    stub: Stub, lost: str, budgeted: bool
) -> None:
    stub.answers["m"] = [LOST_ANSWERS[lost], GOOD]
    log, balance = open_log(budgeted=budgeted)
    async with Fleet([EndpointSpec(stub.url)], POLICY) as fleet:
        await fleet.post(BODY)
        check(log, balance, fleet, Usage(3, 48))
    assert log.requests == 2


@pytest.mark.parametrize("budgeted", [False, True])
async def test_every_lost_request_of_a_call_is_charged_with_it(stub: Stub, budgeted: bool) -> None:
    stub.answers["m"] = [DROPPED, LOST_ANSWERS["504"], Canned(500, b"no"), GOOD]
    log, balance = open_log(budgeted=budgeted)
    async with Fleet([EndpointSpec(stub.url)], POLICY) as fleet:
        await fleet.post(BODY)
        check(log, balance, fleet, Usage(6, 96))


@pytest.mark.parametrize("budgeted", [False, True])
@pytest.mark.parametrize("answers", [[DROPPED, NO_USAGE], [DROPPED, Canned(400, b"no")]])
async def test_without_an_answer_that_tells_it_the_most_is_charged(
    stub: Stub, answers: list[Canned], budgeted: bool
) -> None:
    stub.answers["m"] = [*answers]
    log, balance = open_log(budgeted=budgeted)
    async with Fleet([EndpointSpec(stub.url)], POLICY) as fleet:
        with suppress(EndpointError):
            await fleet.post(BODY)
        assert log.lost.completion == 48
        if not budgeted:  # else the reservation, which is no more than that
            assert log.lost == MOST
        check(log, balance, fleet, log.lost)


@pytest.mark.parametrize("budgeted", [False, True])
async def test_a_cancelled_call_charges_what_was_lost_before(stub: Stub, budgeted: bool) -> None:
    stub.answers["m"] = [DROPPED, SILENT]
    log, balance = open_log(budgeted=budgeted)
    async with Fleet([EndpointSpec(stub.url)], POLICY) as fleet:
        call = asyncio.create_task(fleet.post(BODY))
        await until(lambda: len(stub.bodies) == 2)
        assert len(log.sent) == 2  # both may have been paid, and have no record yet
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert log.lost.completion == 96
        check(log, balance, fleet, log.lost)


async def test_a_stream_tells_it_too_late(stub: Stub) -> None:
    """Its usage comes with its end, when the call has ended."""
    event = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}\n\n'
    stub.answers["m"] = [DROPPED, Canned(200, event + b"data: [DONE]\n\n")]
    log, balance = open_log(budgeted=True)
    async with Fleet([EndpointSpec(stub.url)], POLICY) as fleet:
        chat = ChatFleet.of(fleet, ModelParams("m", max_tokens=48))
        assert "".join([chunk.text async for chunk in chat.astream("q")]) == "x"
        assert log.lost.completion == 48
        check(log, balance, fleet, log.lost)


async def test_an_exhausted_budget_ends_a_retry_at_once(stub: Stub) -> None:
    """A lost request holds its reservation, for which its own retry must not wait."""
    stub.answers["m"] = [DROPPED, GOOD]
    balance = BudgetBalance(BudgetLimits(tokens=MOST.tokens + 10), None, str)
    log = CallLog(account=ItemAccount(balance, NO_PRICES, 0))
    CURRENT_CALLS.set(log)
    async with Fleet([EndpointSpec(stub.url)], POLICY) as fleet, asyncio.timeout(20):
        with pytest.raises(BudgetExhaustedError):
            await fleet.post(BODY)
        check(log, balance, fleet, log.lost)
    assert len(stub.bodies) == 1
