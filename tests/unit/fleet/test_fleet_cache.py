from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import EndpointLostError
from fanfold.backends.core.protocols import CURRENT_CALLS, CallLog
from fanfold.backends.core.types import SIMULATED_FINGERPRINT, Usage
from fanfold.backends.fleet.cache import RequestCache
from fanfold.backends.fleet.endpoint import Endpoint, EndpointSpec
from fanfold.backends.fleet.policy import AdaptiveLimitPolicy, BreakerPolicy

BODY = {
    "model": "m",
    "temperature": 0.0,
    "max_completion_tokens": 9,
    "seed": 1,
    "messages": [{"role": "user", "content": "Which?"}],
}


class Kept(dict[bytes, bytes]):
    """Answers in memory; each time that one is kept it has another place."""

    def __init__(self) -> None:
        self.places, self.count, self.damaged = dict[bytes, int](), 0, set[int]()
        self.contested = False
        self.foreign, self.mine = set[bytes](), set[bytes]()

    def find(self, key: bytes) -> int | None:
        return self.places.get(key)

    def read(self, key: bytes, place: int) -> bytes | None:
        return None if place in self.damaged else self.get(key)

    def put(self, key: bytes, answer: bytes) -> None:
        self.count += 1
        self[key], self.places[key] = answer, self.count

    def forget(self, key: bytes, place: int) -> None:
        if self.places.get(key) == place:
            del self[key], self.places[key]

    def update_claims(self, wishes: Sequence[tuple[bytes, bool]]) -> list[bool]:
        for key, take in wishes:
            if take and key not in self.foreign:
                self.mine.add(key)
            elif not take:
                self.mine.discard(key)
        return [key not in self.foreign for key, _ in wishes]


class Model:
    """Answers when it is let; counts what it is asked."""

    def __init__(self, simulated: bool = False) -> None:
        self.asked = 0
        self.let = asyncio.Semaphore(100)
        self.reason = "stop"
        self.error: Exception | None = None
        self.last = b""
        self.simulated = simulated
        self.endpoint = Endpoint(EndpointSpec("http://h:1"), AdaptiveLimitPolicy(), BreakerPolicy())

    async def __call__(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], Endpoint]:
        self.asked += 1
        number = self.asked
        await self.let.acquire()
        if self.error is not None:
            raise self.error
        message = {"role": "assistant", "content": f"answer {number} to {body['seed']}"}
        document = {
            "choices": [{"message": message, "finish_reason": self.reason}],
            "model": "served",
            "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
            "system_fingerprint": SIMULATED_FINGERPRINT if self.simulated else "fp",
        }
        return document, self.endpoint


async def post(
    cache: RequestCache, body: Mapping[str, Any], model: Model
) -> tuple[dict[str, Any], Endpoint | None]:
    """Send a request as the fleet does."""
    found = await cache.find(body)
    if isinstance(found, dict):
        return found, None
    with found:
        document, endpoint = await model(body)
        cache.store(found, document)
        return document, endpoint


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def release(semaphore: asyncio.Semaphore, count: int) -> None:
    for _ in range(count):
        semaphore.release()


def text(answer: tuple[dict[str, Any], Endpoint | None]) -> str:
    return str(answer[0]["choices"][0]["message"]["content"])


async def test_an_equal_request_is_free() -> None:
    kept, model = Kept(), Model()
    reuse = RequestCache(kept, simulated=False)
    log = CallLog()
    CURRENT_CALLS.set(log)
    first, endpoint = await post(reuse, BODY, model)
    assert (endpoint, log.reused) == (model.endpoint, 0)
    again, nobody = await post(reuse, dict(reversed(BODY.items())), model)
    assert (nobody, model.asked) == (None, 1)
    assert again["choices"] == first["choices"]
    assert again["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert log == CallLog(0, Usage(0, 0), None, "served", False, reused=1)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"messages": [{"role": "user", "content": "Which? "}]},
        {"seed": 2},
        {"max_completion_tokens": 10},
        {"top_k": 1},
        {"response_format": {"type": "text"}},
    ],
)
async def test_any_difference_makes_another_request(change: dict[str, Any]) -> None:
    reuse, model = RequestCache(Kept(), simulated=False), Model()
    await post(reuse, BODY, model)
    await post(reuse, BODY | change, model)
    assert model.asked == 2


async def test_a_drawn_answer_is_shared_only_on_demand() -> None:
    body, model = BODY | {"temperature": 0.7}, Model()
    for sampled, asked in ((False, 3), (True, 4)):
        reuse = RequestCache(Kept(), simulated=False, sampled=sampled)
        for _ in range(3):
            await post(reuse, body, model)
        assert model.asked == asked


async def test_equal_requests_in_flight_ask_once() -> None:
    reuse, model = RequestCache(Kept(), simulated=False), Model()
    model.let = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(post(reuse, BODY, model)) for _ in range(50)]
    await settled()
    assert model.asked == 1
    release(model.let, 50)
    answers = await asyncio.gather(*tasks)
    assert {text(answer) for answer in answers} == {"answer 1 to 1"}
    assert [endpoint for _, endpoint in answers].count(None) == 49
    assert len({id(document) for document, _ in answers}) == 50
    assert reuse._in_flight == {}


@pytest.mark.parametrize("reason", ["length", "content_filter"])
async def test_a_bad_answer_is_its_own_request_s(reason: str) -> None:
    kept, model = Kept(), Model()
    reuse = RequestCache(kept, simulated=False)
    model.reason = reason
    answers = await asyncio.gather(*(post(reuse, BODY, model) for _ in range(6)))
    assert all(endpoint is not None for _, endpoint in answers)
    assert (model.asked, len(kept), reuse._in_flight) == (6, 0, {})


async def test_who_waits_for_a_failure_asks_again() -> None:
    """One takes over, and after a second failure all ask at once."""
    reuse, model = RequestCache(Kept(), simulated=False), Model()
    model.let = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(post(reuse, BODY, model)) for _ in range(10)]
    await settled()
    model.error = EndpointLostError("lost")
    assert model.asked == 1
    model.let.release()
    await settled()
    assert (model.asked, sum(task.done() for task in tasks)) == (2, 1)
    model.let.release()
    await settled()
    assert (model.asked, sum(task.done() for task in tasks)) == (10, 2)
    model.error = None
    release(model.let, 8)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, EndpointLostError) for result in results].count(True) == 2
    assert text(await post(reuse, BODY, model)).startswith("answer")
    assert model.asked == 10


async def test_when_the_one_who_asks_is_cancelled_another_asks() -> None:
    reuse, model = RequestCache(Kept(), simulated=False), Model()
    model.let = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(post(reuse, BODY, model)) for _ in range(5)]
    await settled()
    tasks[0].cancel()
    await settled()
    assert model.asked == 2
    release(model.let, 50)
    answers = await asyncio.gather(*tasks[1:])
    assert {text(answer) for answer in answers} == {"answer 2 to 1"}
    assert tasks[0].cancelled()


async def test_a_waiter_that_is_cancelled_disturbs_nobody() -> None:
    reuse, model = RequestCache(Kept(), simulated=False), Model()
    model.let = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(post(reuse, BODY, model)) for _ in range(3)]
    await settled()
    tasks[1].cancel()
    await settled()
    release(model.let, 50)
    assert text(await tasks[2]) == text(await tasks[0]) == "answer 1 to 1"
    assert (tasks[1].cancelled(), model.asked) == (True, 1)


async def test_an_answer_that_cannot_be_read_is_asked_for() -> None:
    kept, model = Kept(), Model()
    reuse = RequestCache(kept, simulated=False)
    await post(reuse, BODY, model)
    kept.damaged = {1}
    answers = await asyncio.gather(*(post(reuse, BODY, model) for _ in range(4)))
    assert model.asked == 2
    assert {text(answer) for answer in answers} == {"answer 2 to 1"}


@pytest.mark.parametrize("simulated", [True, False])
async def test_answers_of_the_other_kind_do_not_count(simulated: bool) -> None:
    """Neither by their key nor, if somebody brings them under it, by what they say."""
    kept, theirs, ours = Kept(), Model(not simulated), Model(simulated)
    await post(RequestCache(kept, simulated=not simulated), BODY, theirs)
    reuse = RequestCache(kept, simulated=simulated)
    await post(reuse, BODY, ours)
    assert ours.asked == 1
    (foreign, own) = kept
    kept[own] = kept[foreign]
    await post(reuse, BODY, ours)
    assert ours.asked == 2
    assert await post(reuse, BODY, ours)
    assert ours.asked == 2


@pytest.mark.parametrize("text", [b"[]", b"{}", orjson.dumps({"choices": []}), b"null"])
async def test_what_is_no_completion_is_asked_for(text: bytes) -> None:
    kept, model = Kept(), Model()
    reuse = RequestCache(kept, simulated=False)
    await post(reuse, BODY, model)
    for key in kept:
        kept[key] = text
    await post(reuse, BODY, model)
    assert model.asked == 2


async def test_reading_fails_as_whole_and_loses_nobody() -> None:
    class Broken(Kept):
        def read(self, key: bytes, place: int) -> bytes | None:
            raise RuntimeError(f"{key!r} {place}")

    kept, model = Broken(), Model()
    reuse = RequestCache(kept, simulated=False)
    await post(reuse, BODY, model)
    tasks = [post(reuse, BODY, model) for _ in range(3)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, RuntimeError) for result in results)


async def test_a_twin_finds_the_same() -> None:
    model = Model()
    reuse = RequestCache(Kept(), simulated=False)
    await post(reuse, BODY, model)
    assert (await post(reuse.copy_for_loop(), BODY, model))[1] is None


def contested() -> Kept:
    kept = Kept()
    kept.contested = True
    return kept


class Everything(set[bytes]):
    def __contains__(self, key: object) -> bool:
        return True


async def test_another_process_s_answer_is_waited_for() -> None:
    kept, model = contested(), Model()
    (key,) = await kept_key(model)
    kept.foreign = {key}
    reuse = RequestCache(kept, simulated=False)
    tasks = [asyncio.create_task(post(reuse, BODY, model)) for _ in range(4)]
    await asyncio.sleep(0.1)
    assert (model.asked, any(task.done() for task in tasks)) == (1, False)
    kept.put(key, model.last)
    answers = await asyncio.gather(*tasks)
    assert {(text(answer), answer[1]) for answer in answers} == {("answer 1 to 1", None)}
    await reuse.aclose()
    assert (model.asked, kept.mine) == (1, set())


async def test_when_another_process_gives_up_we_ask() -> None:
    kept, model = contested(), Model()
    (key,) = await kept_key(model)
    kept.foreign = {key}
    reuse = RequestCache(kept, simulated=False)
    task = asyncio.create_task(post(reuse, BODY, model))
    await asyncio.sleep(0.05)
    kept.foreign = set()
    assert text(await task) == "answer 2 to 1"
    await reuse.aclose()
    assert kept.mine == set()


async def test_patience_with_another_process_ends() -> None:
    kept, model = contested(), Model()
    kept.foreign = Everything()
    reuse = RequestCache(kept, simulated=False, patience_s=0.1)
    assert text(await post(reuse, BODY, model)) == "answer 1 to 1"


async def test_a_claim_is_given_back_whoever_is_cancelled() -> None:
    kept, model = contested(), Model()
    reuse = RequestCache(kept, simulated=False)
    model.let = asyncio.Semaphore(0)
    for pauses in range(12):
        task = asyncio.create_task(post(reuse, BODY, model))
        for _ in range(pauses):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await reuse.aclose()
        assert (kept.mine, reuse._in_flight) == (set(), {})


async def kept_key(model: Model) -> Kept:
    """Return what one answer is kept under."""
    kept = Kept()
    await post(RequestCache(kept, simulated=False), BODY, model)
    (model.last,) = kept.values()
    return kept
