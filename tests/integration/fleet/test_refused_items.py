"""A refusal that depends on the item fails the item; the endpoints stay healthy."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest
from aiohttp import web

from fanfold.backends.core.errors import (
    EndpointError,
    PromptTooLongError,
    RequestRefusedError,
    RunStoppedError,
)
from fanfold.backends.core.protocols import CURRENT_CALLS, CallLog
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.langchain import ChatFleet
from fanfold.backends.fleet.policy import (
    AdaptiveLimitPolicy,
    BreakerPolicy,
    FleetPolicy,
    ModelParams,
    RetryPolicy,
)

from .conftest import chunk, completion, event, serving, text_of

pytestmark = pytest.mark.integration

PARAMS = ModelParams("m", max_tokens=16)
POLICY = FleetPolicy(
    streams=8,
    retry=RetryPolicy(backoff_s=0.001, backoff_max_s=0.01, refusal_pause_s=0.01),
    limit=AdaptiveLimitPolicy(settle_s=0.01),
    hedge=None,
)
PAGE = "<html><body>Request blocked</body></html>"


def page(status: int) -> web.Response:
    return web.Response(status=status, text=PAGE, content_type="text/html")


def error(status: int, message: str = "flagged", **fields: Any) -> web.Response:
    return web.json_response({"error": {"message": message, **fields}}, status=status)


REFUSALS: dict[str, Callable[[], web.Response]] = {
    "401": lambda: error(401),
    "403": lambda: error(403, "Input was flagged by moderation"),
    "404": lambda: error(404, "No endpoints found that can process this input"),
    "405": lambda: web.Response(status=405, text="Not allowed"),
    "403 page": lambda: page(403),
    "200 page": lambda: page(200),
    "413": lambda: web.Response(status=413, text="too large"),
    "451": lambda: error(451, "Unavailable for legal reasons"),
    "400 policy": lambda: error(400, "content policy", code="content_policy_violation"),
    "400 path": lambda: error(400, "no such path", code="unsupported_endpoint"),
    "400 framework": lambda: error(400, "no such path", code="unsupported_framework"),
    "418": lambda: web.Response(status=418, text="I'm a teapot"),
}


class Server:
    """Refuses items as it is told, and answers the others.

    Attributes:
        refuse: Whether an item is refused.
        asked: Requests by item.
    """

    def __init__(
        self,
        refusal: str | Callable[[], web.Response] = "403",
        refuse: Callable[[str], bool] = lambda item: item.startswith("bad"),
    ) -> None:
        self._refusal = REFUSALS[refusal] if isinstance(refusal, str) else refusal
        self.refuse = refuse
        self.asked: Counter[str] = Counter()
        self.keys: set[str | None] = set()

    async def answer(self, request: web.Request, body: Any) -> web.StreamResponse:
        item = text_of(body)
        self.asked[item] += 1
        self.keys.add(request.headers.get("Authorization"))
        if self.refuse(item):
            return self._refusal()
        await asyncio.sleep(0.01)
        if body.get("stream"):
            text = event(chunk("hello", "stop")) + b"data: [DONE]\n\n"
            return web.Response(body=text, content_type="text/event-stream")
        return web.json_response(completion())


@asynccontextmanager
async def fleet_over(
    *servers: Server, policy: FleetPolicy = POLICY, **spec: Any
) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack, asyncio.timeout(20):
        urls = [await stack.enter_async_context(serving(s.answer)) for s in servers]
        yield await stack.enter_async_context(
            Fleet([EndpointSpec(url, **spec) for url in urls], policy)
        )


async def ask(fleet: Fleet, item: str) -> str:
    CURRENT_CALLS.set(CallLog())
    reply = await FleetClient(fleet, PARAMS).ask([{"role": "user", "content": item}])
    return reply.content


async def stream(fleet: Fleet, item: str) -> str:
    CURRENT_CALLS.set(CallLog())
    chat = ChatFleet.of(fleet, PARAMS)
    try:
        return "".join([part.text async for part in chat.astream(item)])
    except openai.OpenAIError as stock:
        raise stock.__cause__ or stock from None


async def nested(fleet: Fleet, item: str) -> str:
    """Ask for something good first: what the item itself got is no proof of anything."""
    CURRENT_CALLS.set(CallLog())
    model = FleetClient(fleet, PARAMS)
    await model.ask([{"role": "user", "content": f"first of {item}"}])
    reply = await model.ask([{"role": "user", "content": item}])
    return reply.content


async def run(
    fleet: Fleet, items: list[str], places: int = 8, ask: Any = ask
) -> dict[str, str | BaseException]:
    """Take items to their ends in order, with so many in flight, until the run stops."""
    gate, ends = asyncio.Semaphore(places), dict[str, str | BaseException]()
    stopped = list[RunStoppedError]()

    async def one(item: str) -> None:
        async with gate:
            if stopped:
                return
            try:
                ends[item] = await ask(fleet, item)
            except RunStoppedError as stop:
                stopped.append(stop)
            except EndpointError as end:
                ends[item] = end

    await asyncio.gather(*(one(item) for item in items))
    if stopped:
        raise stopped[0]
    return ends


def refused(
    ends: dict[str, str | BaseException], kind: type[Exception] = RequestRefusedError
) -> list[str]:
    """Return the items that were refused; all others were answered."""
    failed = {item: end for item, end in ends.items() if isinstance(end, BaseException)}
    assert all(type(end) is kind for end in failed.values()), failed
    assert {end for item, end in ends.items() if item not in failed} <= {"hello"}
    return sorted(failed)


def states(fleet: Fleet) -> set[str]:
    return {report.state for report in fleet.report()}


def throttle(seconds: str, **fields: Any) -> Callable[[], web.Response]:
    def answer() -> web.Response:
        response = error(429, "Request too large on tokens per min", **fields)
        response.headers["Retry-After"] = seconds
        return response

    return answer


def overloaded() -> web.Response:
    response = error(503, "overloaded")
    response.headers["Retry-After"] = "0.3"
    return response


REFUSALS_FOR_NOW: dict[str, Callable[[], web.Response]] = {
    "429": throttle("0.3", code="rate_limit_exceeded", type="tokens"),
    "503": overloaded,
    "quota": lambda: error(429, "quota", code="quota_exceeded"),
    "cold": lambda: error(503, "not ready to receive tasks"),
    "offline": lambda: error(503, "x is offline"),
    "maintenance": lambda: error(503, "later", code="cluster_under_maintenance"),
}


ITEMS = [*(f"ok {n}" for n in range(12)), "bad 0", *(f"ok {n}" for n in range(12, 24)), "bad 1"]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("refusal", list(REFUSALS))
async def test_the_item_fails_and_the_endpoints_stay(refusal: str, count: int) -> None:
    servers = [Server(refusal) for _ in range(count)]
    async with fleet_over(*servers) as fleet:
        kind = PromptTooLongError if refusal == "413" else RequestRefusedError
        assert refused(await run(fleet, ITEMS), kind) == ["bad 0", "bad 1"]
        assert states(fleet) == {"in use"}
        assert refused(await run(fleet, ["bad 2", "ok 99"]), kind) == ["bad 2"]
    asked = sum((s.asked for s in servers), Counter[str]())
    assert all(asked[item] <= 4 for item in asked)
    assert all(asked[item] == 1 for item in asked if item.startswith("ok"))


@pytest.mark.parametrize("ask", [stream, nested])
@pytest.mark.parametrize("refusal", ["401", "403", "404", "403 page"])
async def test_streamed_and_nested_calls(refusal: str, ask: Any) -> None:
    servers = [Server(refusal), Server(refusal)]
    async with fleet_over(*servers) as fleet:
        assert refused(await run(fleet, ITEMS, ask=ask)) == ["bad 0", "bad 1"]
        assert states(fleet) == {"in use"}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("refusal", ["401", "403", "404", "405"])
async def test_the_first_item_of_a_run(refusal: str, count: int) -> None:
    """Nothing was answered before, but much is in flight: its ends are waited for."""
    servers = [Server(refusal) for _ in range(count)]
    async with fleet_over(*servers) as fleet:
        items = ["bad 0", "bad 1", *ITEMS[:12]]
        assert refused(await run(fleet, items)) == ["bad 0", "bad 1"]
        assert states(fleet) <= {"in use", "recovering"}


async def test_several_deployments_behind_one_gateway() -> None:
    """Paths of one host, as FIRST has them, under one key."""
    server = Server("403")
    async with AsyncExitStack() as stack:
        base = (await stack.enter_async_context(_gateway(server))).removesuffix("/v1")
        members = [
            EndpointSpec(f"{base}/{path}/v1", "token", label=path)
            for path in ("sophia/vllm", "metis/api")
        ]
        fleet = await stack.enter_async_context(Fleet(members, POLICY))
        assert refused(await run(fleet, ITEMS)) == ["bad 0", "bad 1"]
        assert states(fleet) == {"in use"}
    assert server.asked["bad 0"] == 2


@asynccontextmanager
async def _gateway(server: Server) -> AsyncIterator[str]:
    async def chat(request: web.Request) -> web.StreamResponse:
        return await server.answer(request, await request.json())

    app = web.Application()
    app.add_routes([web.post("/{cluster}/{framework}/v1/chat/completions", chat)])
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


class Token:
    """A key that is fetched anew when it is refused."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self.renewals = 0
        self._key = "key 0"

    async def __call__(self) -> str:
        return self._key

    async def renew(self, refused: str) -> None:
        if refused == self._key and self.renewals == 0:
            self.renewals += 1
            self._key = f"key {self.renewals}"


@pytest.mark.parametrize("items", [ITEMS, [*ITEMS[:12], "bad 0"]], ids=["between", "at the end"])
async def test_a_token_that_is_fetched_anew_for_one_item(items: list[str]) -> None:
    token, server = Token(), Server("401")
    async with fleet_over(server, api_key=token) as fleet:
        assert refused(await run(fleet, items)) == [i for i in items if i.startswith("bad")]
        assert states(fleet) == {"in use"}
    assert token.renewals == 1
    assert server.asked["bad 0"] == 2


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("refusal", ["401", "403", "404", "405", "403 page", "400 path"])
@pytest.mark.parametrize("items", [1, 30])
async def test_a_run_of_which_every_item_is_refused_stops(
    refusal: str, count: int, items: int
) -> None:
    servers = [Server(refusal, lambda _: True) for _ in range(count)]
    async with fleet_over(*servers) as fleet:
        with pytest.raises(RunStoppedError, match="no endpoint is left"):
            await run(fleet, [f"ok {n}" for n in range(items)])
        assert states(fleet) == {"ejected"}
    asked = sum(sum(server.asked.values()) for server in servers)
    assert asked <= min(items, 8) * max(2, count)


async def test_an_endpoint_that_refuses_everything_is_left() -> None:
    wrong, right = Server("404", lambda _: True), Server("404")
    async with fleet_over(wrong, right) as fleet:
        assert refused(await run(fleet, ITEMS)) == ["bad 0", "bad 1"]
        assert [report.state for report in fleet.report()] == ["ejected", "in use"]
    assert sum(wrong.asked.values()) <= AdaptiveLimitPolicy().start + 1


async def test_what_one_endpoint_alone_refuses_is_answered_by_another() -> None:
    strict, other = Server("403"), Server("403", lambda _: False)
    async with fleet_over(strict, other) as fleet:
        assert refused(await run(fleet, ITEMS)) == []
        assert states(fleet) == {"in use"}


@pytest.mark.parametrize("count", [1, 2])
async def test_an_outage_stops_the_run_before_many_items_fail(count: int) -> None:
    """All answers are refusals from some moment on: of 200 items ten may end this way."""
    out = asyncio.Event()
    servers = [Server("401", lambda _: out.is_set()) for _ in range(count)]
    async with fleet_over(*servers) as fleet:
        await run(fleet, [f"ok {n}" for n in range(40)])
        out.set()
        ends: list[BaseException] = []

        async def noted(fleet: Fleet, item: str) -> str:
            try:
                return await ask(fleet, item)
            except EndpointError as end:
                ends.append(end)
                raise

        with pytest.raises(RunStoppedError, match="5% of 200"):
            await run(fleet, [f"later {n}" for n in range(100)], ask=noted)
    assert len(ends) <= 10


async def test_five_per_cent_may_be_refused() -> None:
    server = Server("403")
    async with fleet_over(server, policy=replace(POLICY, streams=32)) as fleet:
        items = [f"{'bad' if n % 25 == 7 else 'ok'} {n}" for n in range(500)]
        assert len(refused(await run(fleet, items, places=32))) == 20
        assert states(fleet) == {"in use"}


async def test_more_than_five_per_cent_stop_the_run_and_the_next_one_goes_on() -> None:
    server = Server("403")
    items = [f"{'bad' if n % 10 == 7 else 'ok'} {n}" for n in range(300)]
    ends: dict[str, str | BaseException] = {}
    for _ in range(5):
        left = [item for item in items if item not in ends]
        async with fleet_over(server) as fleet:

            async def noted(fleet: Fleet, item: str) -> str:
                try:
                    ends[item] = await ask(fleet, item)
                except EndpointError as end:
                    ends[item] = end
                return ""

            try:
                await run(fleet, left, ask=noted)
            except RunStoppedError as stop:
                assert "look like an outage" in stop.message  # noqa: PT017 - it may also end
            else:
                break
    assert len(ends) == 300
    assert len(refused(ends)) == 30


async def steady(fleet: Fleet, bad: list[str], seconds: float = 20) -> dict[str, Any]:
    """Ask for other items as long as some are refused; return how the refused ones ended."""
    ends: dict[str, Any] = {}
    answered = 0
    await run(fleet, [f"before {n}" for n in range(16)])
    tasks = [asyncio.create_task(run(fleet, [item])) for item in bad]
    async with asyncio.timeout(seconds):
        while not all(task.done() for task in tasks):
            more = await run(fleet, [f"ok {answered + n}" for n in range(8)])
            assert refused(more) == []
            answered += len(more)
    for task in tasks:
        ends |= await task
    return ends


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("refusal", list(REFUSALS_FOR_NOW))
async def test_an_item_that_alone_is_refused_for_now_fails(refusal: str, count: int) -> None:
    servers = [Server(REFUSALS_FOR_NOW[refusal]) for _ in range(count)]
    policy = replace(POLICY, breaker=BreakerPolicy(open_s=0.05))
    async with fleet_over(*servers, policy=policy) as fleet:
        ends = await steady(fleet, ["bad 0"])
        assert refused(ends) == ["bad 0"]
        assert "answered others" in str(ends["bad 0"])
        assert sum(report.opened for report in fleet.report()) <= count
    assert sum(server.asked["bad 0"] for server in servers) <= 12


async def test_several_items_that_are_refused_for_now() -> None:
    servers = [Server(REFUSALS_FOR_NOW["429"]) for _ in range(2)]
    bad = [f"bad {n}" for n in range(3)]
    async with fleet_over(*servers) as fleet:
        assert refused(await steady(fleet, bad)) == bad


@pytest.mark.parametrize("seconds", ["0.02", "0.2"])
async def test_a_limit_that_all_items_share_fails_none(seconds: str) -> None:
    """The server answers so many in each window, and refuses whatever else comes."""
    limit, window = 30, 0.25
    state = {"until": 0.0, "left": 0}

    def refuse(_: str) -> bool:
        now = asyncio.get_running_loop().time()
        if now >= state["until"]:
            state["until"], state["left"] = now + window, limit
        state["left"] -= 1
        return state["left"] < 0

    server = Server(throttle(seconds), refuse)
    async with fleet_over(server) as fleet:
        ends = await run(fleet, [f"ok {n}" for n in range(300)], places=64)
        assert refused(ends) == []
        assert fleet.health().refusals > 0
