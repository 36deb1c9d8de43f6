"""Repetitions that do not count as attempts are bounded, by the server's request log."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from fanfold.backends.core.errors import (
    AuthenticationError,
    EndpointBusyError,
    EndpointLostError,
    RequestRefusedError,
)
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

from .conftest import chunk, completion, event, serving, text_of, until

pytestmark = pytest.mark.integration

POLICY = FleetPolicy(
    streams=16,
    retry=RetryPolicy(backoff_s=0.01, refusal_pause_s=0.01, first_calls=10**6),
    breaker=BreakerPolicy(failures=10**6, open_s=0.01),
    limit=AdaptiveLimitPolicy(settle_s=0.01),
    hedge=None,
)
Answer = Callable[[str, int, Any], web.Response | None]


class Book:
    """Answers as a function says, and notes the longest answers asked for, by item."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.asked: defaultdict[str, list[int]] = defaultdict(list)

    async def answer(self, request: web.Request, body: Any) -> web.StreamResponse:
        item, most = text_of(body), body["max_completion_tokens"]
        self.asked[item].append(most)
        await asyncio.sleep(0.001)
        answer = self._answer(item, most, body)
        if answer is None:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        return answer


def good(body: Any) -> web.Response:
    if body.get("stream"):
        events = event(chunk("hello", "stop")) + b"data: [DONE]\n\n"
        return web.Response(body=events, content_type="text/event-stream")
    return web.json_response(completion())


def at_most(most: int, words: str = "This model supports at most {} tokens.") -> web.Response:
    error = {"message": f"max_tokens is too large. {words.format(most)}", "param": "max_tokens"}
    return web.json_response({"error": error}, status=400)


@asynccontextmanager
async def fleet_over(*books: Book, policy: FleetPolicy = POLICY) -> AsyncIterator[Fleet]:
    async with asyncio.timeout(20):
        servers = [serving(book.answer) for book in books]
        urls = [await server.__aenter__() for server in servers]
        try:
            async with Fleet([EndpointSpec(url) for url in urls], policy) as fleet:
                yield fleet
        finally:
            for server in servers:
                await server.__aexit__(None, None, None)


def ask(fleet: Fleet, text: str, most: int = 256) -> Any:
    params = ModelParams("m", max_tokens=most)
    return FleetClient(fleet, params).ask([{"role": "user", "content": text}])


async def stream(fleet: Fleet, text: str, most: int = 256) -> str:
    chat = ChatFleet.of(fleet, ModelParams("m", max_tokens=most))
    return "".join([part.text async for part in chat.astream(text)])


async def ends(*calls: Any) -> Counter[str]:
    got = await asyncio.gather(*calls, return_exceptions=True)
    return Counter(type(end).__name__ for end in got)


@pytest.mark.parametrize(
    "refuse",
    [
        lambda _: at_most(100),
        lambda most: at_most(most - 1),
        lambda most: at_most(most, "Use fewer than {}."),
        lambda most: at_most(most, "No number helps."),
    ],
    ids=["the same again", "one less each time", "its own number", "no number"],
)
async def test_a_correction_that_does_not_help_ends(refuse: Any) -> None:
    book = Book(lambda item, most, body: good(body) if item == "ok" else refuse(most))
    async with fleet_over(book) as fleet:
        await ask(fleet, "ok", 8)
        got = await ends(*(ask(fleet, f"bad {n}") for n in range(4)))
    assert got == {"RequestRefusedError": 4}
    del book.asked["ok"]
    assert all(len(most) <= 1 + 3 for most in book.asked.values())


async def test_a_correction_is_the_requests_own() -> None:
    """The room for an answer depends on the prompt; two long prompts leave the same room."""

    def answer(item: str, most: int, body: Any) -> web.Response:
        room = 40 if item.startswith("long") else 4000
        return good(body) if most <= room else at_most(room, "Only {} tokens are left.")

    book = Book(answer)
    async with fleet_over(book) as fleet:
        await ask(fleet, "ok before")
        for item in ("long 1", "long 2", "long 3", "ok after"):
            await ask(fleet, item)
    assert book.asked == {
        "ok before": [256],
        "long 1": [256, 40],
        "long 2": [256, 40],
        "long 3": [256, 40],
        "ok after": [256],
    }


async def test_a_limit_of_the_endpoint_is_learned_from_two_requests() -> None:
    book = Book(lambda _, most, body: good(body) if most <= 100 else at_most(100))
    async with fleet_over(book) as fleet:
        for item in ("1", "2", "3", "4"):
            await ask(fleet, item)
    assert list(book.asked.values()) == [[256, 100], [256, 100], [100], [100]]


async def test_a_limit_of_one_endpoint_is_not_the_others() -> None:
    short = Book(lambda _, most, body: good(body) if most <= 100 else at_most(100))
    long = Book(lambda *given: good(given[-1]))
    async with fleet_over(short, long) as fleet:
        await asyncio.gather(*(ask(fleet, f"{n}") for n in range(40)))
    assert {most for asked in long.asked.values() for most in asked} == {256}
    assert sum(map(len, short.asked.values())) > 2


async def test_streams_are_corrected_alike() -> None:
    def answer(item: str, most: int, body: Any) -> web.Response:
        return good(body) if most <= 100 and item != "bad" else at_most(100)

    book = Book(answer)
    async with fleet_over(book) as fleet:
        got = [await stream(fleet, item) for item in ("1", "2", "3")]
        with pytest.raises(Exception, match="at most 100") as caught:
            await stream(fleet, "bad")
    assert isinstance(caught.value.__cause__, RequestRefusedError)
    assert got == ["hello"] * 3
    assert [len(asked) for asked in book.asked.values()] == [2, 2, 1, 1]


async def test_names_and_dates_are_no_limits() -> None:
    words = "The model mini-2024-07-18 supports at most {} completion tokens."

    def answer(_: str, most: int, body: Any) -> web.Response:
        return good(body) if most <= 1024 else at_most(1024, words)

    book = Book(answer)
    async with fleet_over(book) as fleet:
        await ask(fleet, "q", 5000)
    assert book.asked == {"q": [5000, 1024]}


async def test_an_item_that_alone_is_refused_for_now_is_asked_ever_less() -> None:
    """A 429 for one prompt, while the endpoint goes on with those of others."""
    over = asyncio.Event()
    book = Book(lambda item, _, body: web.Response(status=429) if item == "bad" else good(body))
    policy = replace(POLICY, retry=replace(POLICY.retry, backoff_s=0.1, backoff_max_s=10.0))
    async with fleet_over(book, policy=policy) as fleet:

        async def others() -> None:
            for n in itertools.count():
                await ask(fleet, f"ok {n % 7}")
                if over.is_set():
                    return

        busy = [asyncio.create_task(others()) for _ in range(8)]
        bad = asyncio.create_task(ask(fleet, "bad"))
        await until(lambda: len(book.asked["bad"]) >= 3)
        before = sum(map(len, book.asked.values()))
        await until(lambda: sum(map(len, book.asked.values())) > before + 400)
        assert len(book.asked["bad"]) < 20
        over.set()
        bad.cancel()
        await asyncio.gather(*busy, bad, return_exceptions=True)


async def test_patience_ends_refusals_for_now() -> None:
    book = Book(lambda *_: web.Response(status=429))
    policy = replace(POLICY, retry=replace(POLICY.retry, patience_s=0.2))
    async with fleet_over(book, policy=policy) as fleet:
        with pytest.raises(EndpointBusyError):
            await ask(fleet, "q")
    assert len(book.asked["q"]) < 30


@pytest.mark.parametrize("attempts", [1, 2, 4])
async def test_new_keys_count_as_attempts(attempts: int) -> None:
    """The key's source gives another key each time, and none is taken."""
    keys = map(str, itertools.count())
    book = Book(lambda item, _, body: web.Response(status=401) if item == "bad" else good(body))
    policy = replace(POLICY, retry=replace(POLICY.retry, attempts=attempts))
    async with (
        serving(book.answer) as url,
        Fleet([EndpointSpec(url, lambda: next(keys))], policy) as fleet,
    ):
        await ask(fleet, "ok")
        with pytest.raises((AuthenticationError, RequestRefusedError)):
            await ask(fleet, "bad")
    assert len(book.asked["bad"]) == attempts


async def test_a_closed_connection_is_free_once() -> None:
    book = Book(lambda item, _, body: None if item == "bad" else good(body))
    policy = replace(POLICY, retry=replace(POLICY.retry, attempts=2))
    async with fleet_over(book, policy=policy) as fleet:
        await ask(fleet, "ok")
        with pytest.raises(EndpointLostError):
            await ask(fleet, "bad")
    assert len(book.asked["bad"]) == 3


async def test_empty_answers_are_asked_for_twice_more() -> None:
    book = Book(lambda *_: web.json_response(completion("")))
    async with fleet_over(book, book) as fleet:
        assert (await ask(fleet, "q")).content == ""
    assert len(book.asked["q"]) == 3


GRADED = ModelParams("m", max_tokens=256, extra_body={"logprobs": True})


def refuse_logprobs(item: str, _: int, body: Any) -> web.Response:
    if "logprobs" not in body and item != "bad":
        return good(body)
    error = {"message": "Unsupported parameter: 'logprobs'", "param": "logprobs"}
    return web.json_response({"error": error}, status=400)


async def test_an_optional_field_is_left_out_where_it_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusing, other = Book(refuse_logprobs), Book(lambda *given: good(given[-1]))
    policy = replace(POLICY, optional_fields=frozenset({"logprobs"}))
    async with fleet_over(refusing, other, policy=policy) as fleet:
        model = FleetClient(fleet, GRADED)
        questions = [[{"role": "user", "content": f"{n}"}] for n in range(40)]
        answers = await asyncio.gather(*map(model.ask, questions))
    assert {answer.content for answer in answers} == {"hello"}
    asked = list(refusing.asked.values())
    assert 0 < sum(map(len, asked)) - len(asked) <= POLICY.streams  # only until it is known
    assert all(len(requests) == 1 for requests in other.asked.values())
    assert caplog.text.count("refuses the field logprobs") == 1


async def test_a_field_that_is_refused_without_being_sent_ends() -> None:
    book = Book(refuse_logprobs)
    policy = replace(POLICY, optional_fields=frozenset({"logprobs"}))
    async with fleet_over(book, policy=policy) as fleet:
        model = FleetClient(fleet, GRADED)
        await model.ask([{"role": "user", "content": "ok"}])
        with pytest.raises(RequestRefusedError, match="logprobs"):
            await model.ask([{"role": "user", "content": "bad"}])
    assert len(book.asked["bad"]) <= 1 + 3
