"""An item that holds a stream open and makes another call never waits for itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.tools import tool

from fanfold.backends.budget import reservations
from fanfold.backends.budget.budget import Budget, BudgetSettings
from fanfold.backends.core.errors import BudgetExhaustedError, EndpointLostError
from fanfold.backends.core.money import NO_PRICES, Amount, BudgetLimits
from fanfold.backends.core.protocols import CURRENT_CALLS, CallLog
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.cache import RequestCache
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.langchain import ChatFleet
from fanfold.backends.fleet.policy import (
    AffinityPolicy,
    FleetPolicy,
    HedgePolicy,
    ModelParams,
    RateLimitPolicy,
)
from fanfold.backends.fleet.request import max_usage

from .conftest import chunk, completion, event, serving, text_of, until

pytestmark = pytest.mark.integration

PARAMS = ModelParams("m", max_tokens=16)


class Server:
    """Streams three tokens, or answers at once; keeps what was asked, and the most at a time."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.now = self.most = 0

    async def answer(self, request: web.Request, body: Any) -> web.StreamResponse:
        self.asked.append(text_of(body))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if not body.get("stream"):
                await asyncio.sleep(0.005)
                return web.json_response(_reply(body))
            got = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await got.prepare(request)
            for text in ("a", "b"):
                await got.write(event(chunk(text)))
            await got.write(event(chunk("c", "stop")))
            usage = completion()["usage"]
            await got.write(event(chunk("") | {"choices": [], "usage": usage}))
            await got.write(b"data: [DONE]\n\n")
            return got
        finally:
            self.now -= 1


def _reply(body: Any) -> Any:
    roles = [m["role"] for m in body["messages"]]
    if body.get("tools") and "tool" not in roles:
        call = {"id": "1", "type": "function", "function": {"name": "consult", "arguments": "{}"}}
        return completion(None, message={"tool_calls": [call]}, finish="tool_calls")
    return completion("answered")


@pytest.fixture
def server() -> Server:
    return Server()


@asynccontextmanager
async def chat_over(server: Server, policy: FleetPolicy, **spec: Any) -> AsyncIterator[ChatFleet]:
    async with serving(server.answer) as url, Fleet([EndpointSpec(url, **spec)], policy) as fleet:
        yield ChatFleet.of(fleet, PARAMS)
        await until(lambda: fleet.in_flight == 0)
        assert fleet.health().waiting == 0


async def as_items(
    count: int, item: Callable[[int], Awaitable[Any]], budget: Budget | None = None
) -> list[Any]:
    """Run items at the same time, each with a log of its own."""

    async def one(number: int) -> Any:
        account = budget.open_account() if budget else None
        calls = CallLog(account=account)
        CURRENT_CALLS.set(calls)
        try:
            return await item(number)
        finally:
            calls.close_streams()
            if account is not None:
                account.close()

    async with asyncio.timeout(5):
        tasks = [asyncio.create_task(one(n)) for n in range(count)]
        return await asyncio.gather(*tasks, return_exceptions=True)


async def stream_then_call(chat: ChatFleet, number: int) -> str:
    text = ""
    async for part in chat.astream(f"outer {number}"):
        text += part.text
        if part.text == "a":
            text += (await chat.ainvoke(f"inner {number}")).text
    return text


async def stream_in_stream(chat: ChatFleet, number: int) -> str:
    text = ""
    async for part in chat.astream(f"outer {number}"):
        text += part.text
        if part.text == "a":
            async for inner in chat.astream(f"inner {number}"):
                text += inner.text
    return text


async def two_levels(chat: ChatFleet, number: int) -> str:
    text = ""
    async for part in chat.astream(f"outer {number}"):
        text += part.text
        if part.text == "a":
            text += await stream_then_call(chat, number)
    return text


async def a_stream_and_a_batch(chat: ChatFleet, number: int) -> str:
    text = ""
    async for part in chat.astream(f"outer {number}"):
        text += part.text
        if part.text == "a":
            text += "".join(m.text for m in await chat.abatch(["x", "y", "z"]))
    return text


async def calls_side_by_side(chat: ChatFleet, number: int) -> str:
    answers = await asyncio.gather(*(chat.ainvoke(f"{number}.{n}") for n in range(5)))
    return "".join(a.text for a in answers)


async def streams_that_wait_for_each_other(chat: ChatFleet, _: int) -> str:
    """Each of three streams is read on only when all of them have begun."""
    barrier = asyncio.Barrier(3)

    async def read() -> str:
        text = ""
        async for part in chat.astream("q"):
            text += part.text
            if part.text == "a":
                await barrier.wait()
        return text

    return "".join(await asyncio.gather(read(), read(), read()))


async def a_stream_that_waits_for_a_call_before_it(chat: ChatFleet, number: int) -> str:
    """The call is queued first; the stream gets the slot and waits for the call."""
    done = asyncio.Event()

    async def call() -> str:
        await asyncio.sleep(0.01)
        text = (await chat.ainvoke(f"inner {number}")).text
        done.set()
        return text

    async def read() -> str:
        text = ""
        async for part in chat.astream(f"outer {number}"):
            text += part.text
            if part.text == "a":
                await done.wait()
        return text

    return "".join(await asyncio.gather(call(), read()))


async def from_a_thread(chat: ChatFleet, number: int) -> str:
    """The whole item is synchronous: a stream, and a call while it is open."""

    def work() -> str:
        text = ""
        for part in chat.stream(f"outer {number}"):
            text += part.text
            if part.text == "a":
                text += chat.invoke(f"inner {number}").text
        return text

    return await asyncio.to_thread(work)


async def a_tool_that_asks(chat: ChatFleet, number: int) -> str:
    """A ReAct agent is watched token by token, and its tool asks the same model twice."""

    @tool
    async def consult() -> str:
        """Ask for help."""
        return await stream_then_call(chat, number)

    agent = create_agent(chat, [consult])
    question: Any = {"messages": [{"role": "user", "content": f"agent {number}"}]}
    text = ""
    parts: Any
    async for _, parts in agent.astream(question, stream_mode=["updates"]):
        for update in parts.values():
            text += "".join(str(m.text) for m in update["messages"])
    return text


class Asking(AsyncCallbackHandler):
    """Makes a call of its own at the first token that it hears of."""

    def __init__(self, chat: ChatFleet) -> None:
        self._chat = chat
        self.heard = ""

    async def on_llm_new_token(self, token: Any, **_: Any) -> None:
        if token == "a":
            self.heard += (await self._chat.ainvoke("from the handler")).text


async def a_handler_that_asks(chat: ChatFleet, _: int) -> str:
    handler, text = Asking(chat), ""
    async for part in chat.astream("q", {"callbacks": [handler]}):
        text += part.text
    return text + handler.heard


EXPECTED = {
    stream_then_call: "aansweredbc",
    stream_in_stream: "aabcbc",
    two_levels: "aaansweredbcbc",
    a_stream_and_a_batch: "aansweredansweredansweredbc",
    calls_side_by_side: "answered" * 5,
    streams_that_wait_for_each_other: "abc" * 3,
    a_stream_that_waits_for_a_call_before_it: "answeredabc",
    from_a_thread: "aansweredbc",
    a_handler_that_asks: "abcanswered",
    a_tool_that_asks: "aansweredbcanswered",
}


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("item", list(EXPECTED), ids=lambda item: item.__name__)
async def test_nested_calls_end(server: Server, item: Any, streams: int) -> None:
    async with chat_over(server, FleetPolicy(streams=streams)) as chat:
        got = await as_items(6, lambda n: item(chat, n))
    assert got == [EXPECTED[item]] * 6


QUICK = HedgePolicy(quantile=0.0, peak=1, share=9.0, tick_s=0.001)


@pytest.mark.parametrize(
    ("policy", "spec"),
    [
        (FleetPolicy(), {"max_in_flight": 1}),
        (FleetPolicy(streams=2), {"max_in_flight": 1, "requests_per_s": 200.0}),
        (FleetPolicy(streams=2, rate_limit=RateLimitPolicy(requests_per_s=200.0)), {}),
        (
            FleetPolicy(streams=1, rate_limit=RateLimitPolicy(tokens_per_min=1e6)),
            {"tokens_per_min": 1e6},
        ),
        (FleetPolicy(streams=4, rate_limit=RateLimitPolicy(tokens_per_min=500)), {}),
        (FleetPolicy(streams=4), {"tokens_per_min": 500}),
        (FleetPolicy(streams=2, hedge=QUICK), {}),
        (FleetPolicy(streams=2, hedge=None, affinity=AffinityPolicy()), {"max_in_flight": 1}),
    ],
)
@pytest.mark.parametrize("item", [stream_then_call, two_levels, from_a_thread])
async def test_nested_calls_end_within_other_bounds(
    server: Server, item: Any, policy: FleetPolicy, spec: Any
) -> None:
    async with chat_over(server, policy, **spec) as chat:
        got = await as_items(5, lambda n: item(chat, n))
    assert got == [EXPECTED[item]] * 5


async def test_calls_side_by_side_keep_to_the_bound(server: Server) -> None:
    """Only a call that others of its item may wait for uses the item's slot."""
    async with chat_over(server, FleetPolicy(streams=2)) as chat:
        await as_items(4, lambda n: calls_side_by_side(chat, n))
    assert server.most <= 2


async def test_other_items_begin_while_slots_are_shared(server: Server) -> None:
    """A nested call takes no place of others, and a stream that ends frees its own."""
    async with chat_over(server, FleetPolicy(streams=3)) as chat:
        got = await as_items(30, lambda n: stream_then_call(chat, n))
    assert got == ["aansweredbc"] * 30
    assert len(server.asked) == 60


def budget_for(requests: int) -> Budget:
    return Budget(BudgetSettings(BudgetLimits(requests=requests), NO_PRICES), Amount(), None)


def ends(results: list[Any]) -> tuple[int, int]:
    """Return how many items ended well, and how many were refused for the budget."""
    refused = sum(isinstance(r, BudgetExhaustedError) for r in results)
    assert all(isinstance(r, str | BudgetExhaustedError) for r in results), results
    return len(results) - refused, refused


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("item", [stream_then_call, stream_in_stream, two_levels, from_a_thread])
async def test_a_budget_of_one_request_per_item_refuses(
    server: Server, item: Any, streams: int
) -> None:
    budget = budget_for(4)
    async with chat_over(server, FleetPolicy(streams=streams)) as chat:
        done, refused = ends(await as_items(4, lambda n: item(chat, n), budget))
    assert refused > 0
    assert done + refused == 4
    assert len(server.asked) <= 4
    assert budget.balance.reserved == Amount()
    assert budget.total_spent().requests <= 4


async def test_a_budget_waits_for_items_that_go_on(server: Server) -> None:
    """The cap carries little at a time, and what is settled makes room: nobody is refused."""
    one = max_usage({"messages": [{"role": "user", "content": "inner 0"}], "max_tokens": 16})
    terms = BudgetSettings(BudgetLimits(tokens=5 * one.tokens), NO_PRICES)
    budget = Budget(terms, Amount(), None)
    async with chat_over(server, FleetPolicy(streams=8)) as chat:

        async def item(number: int) -> str:
            return (await chat.ainvoke(f"inner {number % 10}")).text

        got = await as_items(40, item, budget)
    assert got == ["answered"] * 40
    assert budget.total_spent() == Amount(40, 40 * Usage(3, 2).tokens)


async def test_a_call_that_waits_behind_streams_without_budget_is_refused_or_served(
    server: Server,
) -> None:
    """One item holds the only slot and waits for budget; the other holds budget and waits."""
    budget = budget_for(2)
    begun = asyncio.Event()
    async with chat_over(server, FleetPolicy(streams=1)) as chat:

        async def item(number: int) -> Any:
            if number:
                await begun.wait()
                return (await chat.ainvoke("waits for the slot")).text
            text = ""
            async for part in chat.astream("holds the slot"):
                text += part.text
                if part.text == "a":
                    begun.set()
                    await until(lambda: chat.fleet.health().waiting == 1)
                    text += (await chat.ainvoke("inner")).text
            return text

        done, refused = ends(await as_items(2, item, budget))
    assert (done, refused) == (1, 1)


class Kept:
    """Answers are shared while they are asked for, and kept nowhere."""

    contested = False

    def find(self, key: bytes) -> int | None:
        del key
        return None

    def read(self, key: bytes, place: int) -> bytes | None:
        del key, place
        return None

    def put(self, key: bytes, answer: bytes) -> None: ...

    def forget(self, key: bytes, place: int) -> None: ...

    def update_claims(self, wishes: Sequence[tuple[bytes, bool]]) -> list[bool]:
        return [True] * len(wishes)


@pytest.mark.parametrize("streams", [1, 2])
async def test_a_nested_call_does_not_wait_for_an_equal_one_that_waits_for_its_slot(
    server: Server, streams: int
) -> None:
    params = ModelParams("m", temperature=0.0, max_tokens=16)
    async with serving(server.answer) as url:
        reuse = RequestCache(Kept(), simulated=False)
        policy = FleetPolicy(streams=streams)
        async with Fleet([EndpointSpec(url)], policy, cache=reuse) as fleet:
            chat = ChatFleet.of(fleet, params)
            begun, queued = asyncio.Barrier(streams + 1), asyncio.Barrier(streams)

            async def item(number: int) -> str:
                if number >= streams:
                    await begun.wait()
                    return (await chat.ainvoke("the same")).text
                text = ""
                async for part in chat.astream(f"outer {number}"):
                    text += part.text
                    if part.text == "a":
                        await begun.wait()
                        await until(lambda: fleet.health().waiting > 0)
                        await queued.wait()
                        text += (await chat.ainvoke("the same")).text
                return text

            got = await as_items(streams + 1, item)
    assert got == [*["aansweredbc"] * streams, "answered"]


async def test_quiet_streams_are_no_sign_of_a_jam_while_they_are_read(server: Server) -> None:
    """Items that only read keep to the bound, however many wait."""
    async with chat_over(server, replace(FleetPolicy(), streams=3)) as chat:

        async def item(_: int) -> str:
            return "".join([part.text async for part in chat.astream("q")])

        got = await as_items(20, item)
    assert got == ["abc"] * 20
    assert server.most <= 3


async def perform(chat: ChatFleet, what: Any, number: int) -> None:
    """Do as a small program says: ask, or open a stream or several branches around others."""
    match what:
        case str():
            await chat.ainvoke(what.format(number))
        case ("stream", *inner):
            parts = 0
            async for _ in chat.astream(f"outer {number}"):
                for one in inner[parts : parts + 1]:
                    await perform(chat, one, number)
                parts += 1
        case ("gather", *inner):
            async with asyncio.TaskGroup() as group:
                for one in inner:
                    group.create_task(perform(chat, one, number))
        case (*inner,):
            for one in inner:
                await perform(chat, one, number)


async def all_of(
    server: Any, programs: Any, policy: FleetPolicy, spec: Any, *bounds: Any
) -> list[Any]:
    """Run programs as items, within a budget and with shared answers if there are any."""
    budget, reuse = (*bounds, None, None)[:2]
    async with (
        serving(server.answer) as url,
        Fleet([EndpointSpec(url, **spec)], policy, cache=reuse) as fleet,
    ):
        chat = ChatFleet.of(fleet, ModelParams("m", temperature=0.0, max_tokens=16))
        got = await as_items(len(programs), lambda n: perform(chat, programs[n], n), budget)
        await until(lambda: fleet.in_flight == 0)
        assert fleet.health().waiting == 0
    return got


def reasons(results: list[Any]) -> list[str]:
    """Return how items ended."""
    found = []
    for result in results:
        error = result
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        found.append("done" if error is None else type(error).__name__)
    return found


REFUSED = "BudgetExhaustedError"
NARROW = {"max_in_flight": 1}


@pytest.mark.parametrize(
    ("programs", "caps", "spec", "expected"),
    [
        # A branch ends, and only then does nobody go on: what it held came back before.
        ([("stream", ("gather", "x", "y")), "z"], (3, 0), NARROW, [REFUSED, "done"]),
        ([("stream", ("gather", "x", ("stream", "y"))), "z"], (5, 0), NARROW, ["done", "done"]),
        ([("stream", ("gather", "x", ("stream", "y"))), "z"], (3, 0), NARROW, [REFUSED, "done"]),
        # The endpoint rests until after the last event.
        ([("stream", "x"), "z"], (2, 0), NARROW | {"requests_per_s": 1.5}, [REFUSED, "done"]),
        # One item waits for the answer to an equal request, whose item waits for its repairs.
        ([("x", "equal"), "equal"], (3, 1), {}, ["done", REFUSED]),
        # What the first of several branches keeps for repairs carries the others.
        ([("gather", "x", "y", "z")], (3, 2), {}, ["done"]),
    ],
)
async def test_items_that_wait_for_budget_and_for_each_other_end(
    server: Server, programs: Any, caps: tuple[int, int], spec: Any, expected: list[str]
) -> None:
    budget = Budget(
        BudgetSettings(BudgetLimits(requests=caps[0]), NO_PRICES, caps[1]), Amount(), None
    )
    reuse = RequestCache(Kept(), simulated=False)
    got = await all_of(server, programs, FleetPolicy(), spec, budget, reuse)
    assert reasons(got) == expected
    assert budget.balance.reserved == Amount()


@pytest.mark.parametrize("other", ["plain", ("stream", "plain")])
@pytest.mark.parametrize("spec", [{}, NARROW])
@pytest.mark.parametrize("streams", [1, 8])
async def test_an_item_that_is_refused_while_it_streams_lets_others_prove_the_endpoint(
    server: Server, streams: int, spec: Any, other: Any
) -> None:
    """Its stream holds the only slot, and who could show whether it is at fault waits for it."""

    async def answer(request: web.Request, body: Any) -> web.StreamResponse:
        if text_of(body) == "flagged":
            return web.json_response({"error": {"message": "flagged"}}, status=403)
        return await server.answer(request, body)

    programs: list[Any] = [("stream", "flagged"), *[other] * 3]
    got = await all_of(SimpleNamespace(answer=answer), programs, FleetPolicy(streams=streams), spec)
    assert reasons(got) == ["OpenAIPermissionDeniedError", *["done"] * 3]


async def test_who_waits_for_an_equal_answer_does_not_keep_its_slot_from_it(
    server: Server,
) -> None:
    begun, told = asyncio.Event(), asyncio.Event()

    async def answer(request: web.Request, body: Any) -> web.StreamResponse:
        if body.get("stream"):
            begun.set()
            await told.wait()
        return await server.answer(request, body)

    reuse, policy = RequestCache(Kept(), simulated=False), FleetPolicy(streams=1)
    async with (
        serving(answer) as url,
        Fleet([EndpointSpec(url)], policy, cache=reuse) as fleet,
    ):
        chat = ChatFleet.of(fleet, ModelParams("m", temperature=0.0, max_tokens=16))

        async def item(number: int) -> None:
            if number:
                await begun.wait()
                await chat.ainvoke("the same")
                return
            stream = chat.astream("outer")
            reading = asyncio.ensure_future(anext(stream))
            await until(lambda: fleet.health().waiting > 0)
            asking = asyncio.create_task(chat.ainvoke("the same"))
            await asyncio.sleep(0)
            told.set()
            await reading
            await asking
            async for _ in stream:
                pass

        got = await as_items(2, item)
    assert reasons(got) == ["done", "done"]


PROGRAMS = st.recursive(
    st.sampled_from(["call {}", "equal"]),
    lambda inner: st.tuples(st.sampled_from(["stream", "gather"]), inner, inner),
    max_leaves=5,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    programs=st.lists(PROGRAMS, min_size=2, max_size=5),
    streams=st.sampled_from([1, 2, 8]),
    spec=st.sampled_from([{}, NARROW, {"max_in_flight": 2, "requests_per_s": 200.0}]),
    caps=st.tuples(st.integers(2, 20), st.integers(0, 2)),
    shared=st.booleans(),
)
def test_whatever_items_do_within_whatever_bounds_they_end(
    monkeypatch: pytest.MonkeyPatch, programs: Any, caps: tuple[int, int], **bounds: Any
) -> None:
    monkeypatch.setattr(reservations, "_POLL_S", 0.01)
    budget = Budget(
        BudgetSettings(BudgetLimits(requests=caps[0]), NO_PRICES, caps[1]), Amount(), None
    )
    policy = FleetPolicy(streams=bounds["streams"])
    reuse = RequestCache(Kept(), simulated=False) if bounds["shared"] else None
    got = asyncio.run(all_of(Server(), programs, policy, bounds["spec"], budget, reuse))
    assert set(reasons(got)) <= {"done", REFUSED}
    assert budget.balance.reserved == Amount()
    assert budget.total_spent().requests <= caps[0]


async def test_a_stream_that_is_closed_while_it_is_read_is_counted_once(server: Server) -> None:
    """An item ends and leaves a branch behind that reads on."""
    async with chat_over(server, FleetPolicy()) as chat:
        log = CallLog()
        CURRENT_CALLS.set(log)
        stream, _ = await chat.fleet.open_stream(
            {"messages": [{"role": "user", "content": "q"}], "max_tokens": 9, "stream": True}
        )
        lines = stream.lines()
        await anext(lines)
        log.close_streams()
        with pytest.raises(EndpointLostError):
            async for _ in lines:
                pass
    assert (log.in_flight, log.idle_streams, chat.fleet.in_flight) == (0, 0, 0)


async def test_a_call_that_blocks_the_loop_does_not_wait_for_items_in_it(server: Server) -> None:
    budget = budget_for(2)
    async with chat_over(server, FleetPolicy()) as chat:

        async def item(number: int) -> None:
            if number < 2:
                await chat.ainvoke("in flight")
            else:
                await until(lambda: chat.fleet.in_flight == 2)
                chat.invoke("nothing answers the others while this waits")

        got = await as_items(3, item, budget)
    assert reasons(got) == ["done", "done", REFUSED]
