"""A budget that ends: shorter answers are reserved, by those seen, and asked for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fanfold.backends.budget.reservations import AnswerLengths, BudgetBalance, ItemAccount
from fanfold.backends.core.errors import BudgetExhaustedError
from fanfold.backends.core.money import NO_PRICES, Amount, BudgetLimits
from fanfold.backends.core.protocols import CURRENT_CALLS, CallLog
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.policy import FleetPolicy
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
