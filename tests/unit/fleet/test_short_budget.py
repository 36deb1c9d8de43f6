"""A budget that ends: shorter answers are reserved, by those seen, and asked for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson
import pytest

from fanfold.backends.budget.reservations import AnswerLengths, BudgetBalance, ItemAccount
from fanfold.backends.core.errors import BudgetExhaustedError
from fanfold.backends.core.money import NO_PRICES, Amount, BudgetLimits
from fanfold.backends.core.protocols import CURRENT_CALLS, CallLog
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.failures import HTTPAnswer
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.policy import FleetPolicy
from fanfold.backends.fleet.request import RequestCharge, max_usage
from fanfold.backends.simulated.engine import EngineSpec
from fanfold.tests.support.memory_servers import MODEL, MemoryTransport, open_servers
from fanfold.tests.support.virtual_clock import run_virtual

STREAMS, MOST, CAP = 32, 2000, 100_000
POLICY = replace(FleetPolicy.from_limits(streams=STREAMS), hedge=None)


def count_tokens(body: Mapping[str, Any]) -> int:
    """Count a prompt as the server does."""
    return -(-len(f"user:{body['messages'][0]['content']}") // 4)


async def count(body: Mapping[str, Any]) -> int | None:
    return count_tokens(body)


def make_body(number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"question {number:06}"}]
    return {"model": MODEL, "messages": messages, "max_tokens": MOST}


@dataclass
class Found:
    """What was answered, and what the servers wrote."""

    whole: int = 0
    tokens: int = 0
    seconds: float = 0.0


class CountingTransport(MemoryTransport):
    """Transport that counts the tokens of prompts and answers as they are sent."""

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.limits, self.found = list[int](), Found()

        def read_length(body: Mapping[str, Any]) -> int:
            length = lengths[body["messages"][0]["content"]]
            self.limits.append(body["max_tokens"])
            self.found.tokens += count_tokens(body) + min(length, body["max_tokens"])
            return length

        super().__init__(POLICY, open_servers(EngineSpec(), 2), read_length)


async def spend(lengths: AnswerLengths | None) -> tuple[Found, list[int]]:
    """Ask questions until the budget is exhausted."""
    draw = random.Random(0)
    answers = {make_body(n)["messages"][0]["content"]: draw.randint(80, 120) for n in range(2000)}
    balance = BudgetBalance(BudgetLimits(tokens=CAP), None, str)
    transport = CountingTransport(answers)
    found = transport.found
    numbers = iter(range(2000))

    async def work() -> None:
        for number in numbers:
            account = ItemAccount(balance, NO_PRICES, 0, count, lengths)
            CURRENT_CALLS.set(CallLog(index=number, account=account))
            try:
                answer, _ = await fleet.post(make_body(number))
            except BudgetExhaustedError:
                return
            finally:
                account.close()
            assert answer["choices"][0]["finish_reason"] == "stop"
            found.whole += 1

    urls = [f"http://server-{n}.test:8000/v1" for n in range(2)]
    async with Fleet([EndpointSpec(url) for url in urls], POLICY, transport=transport) as fleet:
        await asyncio.gather(*(work() for _ in range(STREAMS)))
        found.seconds = asyncio.get_running_loop().time()
    assert balance.settled.tokens == found.tokens <= CAP
    assert not any(balance.reserved)
    return found, transport.limits


def test_the_last_items_before_the_end_reserve_what_answers_take() -> None:
    with_max, limits = run_virtual(lambda: spend(None))
    assert set(limits) == {MOST}
    learnt = AnswerLengths()
    found, limits = run_virtual(lambda: spend(learnt))
    assert learnt.most is not None
    assert 120 <= learnt.most <= 150
    assert limits[0] == MOST
    assert limits[-1] <= 150
    assert found.tokens > CAP - 250
    assert with_max.tokens < CAP - 1000
    assert found.whole > with_max.whole
    assert found.whole / found.seconds > with_max.whole / with_max.seconds


class ReasoningTransport(CountingTransport):
    """Transport to servers that require room for the model's reasoning."""

    async def send(
        self, url: str, body: bytes, headers: Mapping[str, str], proxied: bool = False
    ) -> HTTPAnswer:
        if (most := orjson.loads(body)["max_tokens"]) <= 1024:
            self.limits.append(most)
            message = b"max_tokens must be greater than thinking.budget_tokens"
            return HTTPAnswer(400, {}, b'{"error": {"message": "%b"}}' % message, headers)
        return await super().send(url, body, headers, proxied)


def test_a_shorter_limit_that_is_refused_fails_no_item() -> None:
    async def main() -> tuple[dict[str, Any], list[int], BudgetBalance]:
        lengths = AnswerLengths()
        for _ in range(200):
            lengths.add(100)
        balance = BudgetBalance(BudgetLimits(tokens=4000), None, str)
        transport = ReasoningTransport({"question 000001": 1000})
        held = Amount(0, 2500)
        await balance.reserve(held)
        account = ItemAccount(balance, NO_PRICES, 0, count, lengths)
        CURRENT_CALLS.set(CallLog(index=1, account=account))
        url = "http://server-0.test:8000/v1"
        async with Fleet([EndpointSpec(url)], POLICY, transport=transport) as fleet:
            asked = asyncio.create_task(fleet.post(make_body(1)))
            await asyncio.sleep(60)
            balance.settle(held, Amount())
            answer, _ = await asked
        account.close()
        return answer, transport.limits, balance

    answer, limits, balance = run_virtual(main)
    assert limits == [125, MOST]
    assert answer["usage"]["completion_tokens"] == 1000
    assert balance.settled.tokens == answer["usage"]["total_tokens"]
    assert not any(balance.reserved)


@pytest.mark.parametrize("is_enough", [True, False])
def test_an_answer_that_is_cut_is_asked_for_again_in_full(is_enough: bool) -> None:
    """Its limit is that of the call; if the budget has no room for it, the item stays open."""

    async def main() -> tuple[dict[str, Any] | None, list[int], BudgetBalance, Found]:
        lengths, body = AnswerLengths(), make_body(1)
        for _ in range(200):
            lengths.add(100)
        balance = BudgetBalance(BudgetLimits(tokens=4000 if is_enough else 2000), None, str)
        transport = CountingTransport({"question 000001": 1000})
        held = Amount(0, 2500) if is_enough else Amount()
        await balance.reserve(held)
        account = ItemAccount(balance, NO_PRICES, 0, count, lengths)
        CURRENT_CALLS.set(CallLog(index=1, account=account))
        url = "http://server-0.test:8000/v1"
        answer: dict[str, Any] | None = None
        async with Fleet([EndpointSpec(url)], POLICY, transport=transport) as fleet:
            asked = asyncio.create_task(fleet.post(body))
            await asyncio.sleep(60)
            balance.settle(held, Amount())
            try:
                answer, _ = await asked
            except BudgetExhaustedError:
                answer = None
        account.close()
        return answer, transport.limits, balance, transport.found

    answer, limits, balance, found = run_virtual(main)
    assert balance.settled.tokens == found.tokens
    assert not any(balance.reserved)
    if is_enough:
        assert limits == [125, MOST]
        assert answer is not None
        assert answer["usage"]["completion_tokens"] == 1000
    else:
        assert limits == [125]
        assert answer is None


@pytest.mark.parametrize(
    ("change", "most"),
    [
        ({}, 125),
        ({"n": 2}, 2 * MOST),
        ({"max_tokens": float(MOST)}, MOST),
        ({"max_tokens": MOST + 1, "max_completion_tokens": float(MOST)}, MOST),
        ({"max_tokens": MOST + 1, "max_completion_tokens": MOST}, 125),
    ],
)
async def test_no_answer_may_be_longer_than_what_is_reserved(
    change: dict[str, Any], most: int
) -> None:
    lengths, balance = AnswerLengths(), BudgetBalance(BudgetLimits(tokens=5000), None, str)
    for _ in range(200):
        lengths.add(100)
    assert balance.try_reserve(Amount(0, 4000))
    account = ItemAccount(balance, NO_PRICES, 0, count, lengths)
    log = CallLog(index=1, account=account)
    asked = asyncio.create_task(RequestCharge.reserve(log, make_body(1) | change, shorten=True))
    await asyncio.sleep(0)
    balance.settle(Amount(0, 4000), Amount())
    charge = await asked
    reservation = charge.reservation
    assert reservation is not None
    assert reservation.usage.completion == max_usage(charge.body).completion == most
    charge.release(sent=False)
    account.close()


async def test_answers_are_not_shortened_for_want_of_requests() -> None:
    """One that is cut would take a further request."""
    lengths, balance = AnswerLengths(), BudgetBalance(BudgetLimits(requests=2), None, str)
    for _ in range(200):
        lengths.add(100)
    assert balance.try_reserve(Amount(requests=2))
    account = ItemAccount(balance, NO_PRICES, 0, count, lengths)
    log = CallLog(index=1, account=account)
    asked = asyncio.create_task(RequestCharge.reserve(log, make_body(1), shorten=True))
    await asyncio.sleep(0)
    balance.settle(Amount(requests=2), Amount())
    charge = await asked
    assert max_usage(charge.body).completion == MOST
    charge.release(sent=False)
    account.close()
