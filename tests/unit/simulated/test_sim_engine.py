from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.simulated.engine import (
    BLOCK_TOKENS,
    BlockCache,
    Engine,
    EngineRequest,
    EngineSpec,
    hash_blocks,
)

SPEC = EngineSpec(
    kv_blocks=1000,
    max_num_seqs=4,
    max_num_batched_tokens=256,
    step_s=0.01,
    context_token_s=0.0,
    prompt_token_s=0.001,
)


def ask(name: str, tokens: int = 64, answer: int = 10, shared: str = "") -> EngineRequest:
    text = (shared + f"{name} " * tokens * 2)[: tokens * 4]
    return EngineRequest(hash_blocks(text, BLOCK_TOKENS * 4), tokens, answer)


def finish(engine: Engine) -> list[EngineRequest]:
    ended = []
    while engine.due_at is not None:
        ended += [one for one in engine.advance(engine.due_at) if one.ended_at is not None]
    return ended


def test_a_lone_request_takes_its_prompt_and_a_step_for_each_token() -> None:
    engine, request = Engine(SPEC), ask("a", tokens=64, answer=10)
    engine.submit(request, 5.0)
    assert finish(engine) == [request]
    assert request.first_at == pytest.approx(5.0 + 0.01 + 64 * 0.001)
    assert request.ended_at == pytest.approx(5.0 + 0.074 + 9 * 0.01)
    assert engine.busy_s == pytest.approx(0.164)
    assert engine.running == engine.waiting == 0


def test_context_lengthens_the_steps() -> None:
    spec = EngineSpec(kv_blocks=1000, step_s=0.01, context_token_s=1e-5, prompt_token_s=0.0)
    engine, request = Engine(spec), ask("a", tokens=64, answer=11)
    engine.submit(request, 0.0)
    finish(engine)
    steps = [0.01 + 1e-5 * (64 + n) for n in range(10)]
    assert request.ended_at == pytest.approx(0.01 + sum(steps))


def test_a_batch_shares_its_steps_and_a_full_one_queues() -> None:
    engine, requests = Engine(SPEC), [ask(f"r{n}", 16, 10) for n in range(6)]
    for request in requests:
        engine.submit(request, 0.0)
    assert (engine.running, engine.waiting) == (1, 5)  # the first began its step alone
    engine.advance(0.03)
    assert (engine.running, engine.waiting) == (4, 2)
    finish(engine)
    ends = [request.ended_at for request in requests]
    assert ends[1] == ends[2] == ends[3]
    assert ends[5] is not None
    assert ends[1] is not None
    assert ends[5] > ends[1]


def test_a_request_joins_the_batch_with_the_next_step() -> None:
    engine, first, second = Engine(SPEC), ask("a", 16, 100), ask("b", 16, 2)
    engine.submit(first, 0.0)
    engine.advance(0.0265)
    engine.submit(second, 0.0313)  # steps end at 0.026, 0.036, ...
    assert engine.due_at == pytest.approx(0.036)
    engine.advance(engine.due_at or 0.0)
    assert engine.running == 2
    finish(engine)
    assert second.first_at == pytest.approx(0.036 + 0.01 + 0.016)


def test_long_prompts_are_computed_in_parts() -> None:
    engine, request = Engine(SPEC), ask("a", tokens=600, answer=1)
    engine.submit(request, 0.0)
    finish(engine)
    assert request.ended_at == request.first_at == pytest.approx(3 * 0.01 + 0.6)


def test_a_shared_prefix_is_computed_once() -> None:
    shared = "the same text " * 40
    engine = Engine(SPEC)
    first, second = ask("a", 200, 2, shared), ask("b", 200, 2, shared)
    engine.submit(first, 0.0)
    finish(engine)
    engine.submit(second, 10.0)
    finish(engine)
    blocks = len(shared) // (4 * BLOCK_TOKENS)
    assert (first.cached_tokens, second.cached_tokens) == (0, blocks * BLOCK_TOKENS)
    assert engine.computed_tokens == 400 - blocks * BLOCK_TOKENS


def test_one_token_of_a_repeated_prompt_is_computed() -> None:
    engine = Engine(SPEC)
    for at in (0.0, 10.0):
        request = ask("a", 64, 1)
        engine.submit(request, at)
        finish(engine)
    assert request.cached_tokens == 48


def test_without_prefix_caching_nothing_is_found() -> None:
    engine = Engine(EngineSpec(kv_blocks=100, prefix_caching=False))
    for _ in range(2):
        engine.submit(ask("a"), 0.0)
        finish(engine)
    assert engine.cache.hits == 0
    assert engine.computed_tokens == 128


def test_the_least_recently_used_blocks_are_evicted_and_ends_before_beginnings() -> None:
    cache = BlockCache(6)
    cache.acquire([1, 2], 1)
    cache.acquire([3, 4], 1)
    cache.release([1, 2], 1)
    cache.release([3, 4], 1)
    cache.acquire([5], 1)  # takes the answer's block and block 2
    assert cache.count_cached([1, 2]) == 1
    assert cache.count_cached([3, 4]) == 2
    assert not cache.has_room([6, 7, 8, 9, 10], 0, 0)
    assert cache.has_room([6, 7, 8, 9], 0, 0)
    assert not cache.has_room([3, 4, 8, 9], 2, 1)  # found blocks are not free for others


def test_a_request_waits_for_blocks() -> None:
    engine = Engine(EngineSpec(kv_blocks=10, max_num_seqs=8))
    first, second = ask("a", 96, 16), ask("b", 96, 16)
    engine.submit(first, 0.0)
    engine.submit(second, 0.0)
    engine.advance(0.05)
    assert (engine.running, engine.waiting) == (1, 1)
    finish(engine)
    assert second.first_at is not None
    assert first.ended_at is not None
    assert second.first_at > first.ended_at
    with pytest.raises(ValueError, match="11 blocks does not fit 10"):
        engine.submit(ask("c", 170, 1), 0.0)


def test_cancelled_requests_leave_queue_batch_and_cache() -> None:
    engine = Engine(SPEC)
    requests = [ask(f"r{n}", 64, 50) for n in range(6)]
    for request in requests:
        engine.submit(request, 0.0)
    engine.advance(0.4)
    for request in (requests[0], requests[5], requests[0]):
        engine.cancel(request)
    ended = finish(engine)
    assert ended == requests[1:5]
    assert math.isnan(requests[0].ended_at or 0.0)
    assert (engine.running, engine.waiting, engine.cache.in_use) == (0, 0, 0)
    engine.submit(late := ask("late", 64, 10), 100.0)
    finish(engine)
    assert late.ended_at == pytest.approx(100.0 + 0.01 + 0.064 + 0.09)


@given(st.integers(0, 2**32), st.booleans())
def test_all_requests_end_and_all_blocks_return(seed: int, cancels: bool) -> None:
    draw = random.Random(seed)
    engine = Engine(EngineSpec(kv_blocks=60, max_num_seqs=5, max_num_batched_tokens=100))
    requests, ended, now = [], [], 0.0
    for _ in range(40):
        shared = f"group {draw.randrange(3)} " * draw.randrange(12)
        request = ask(str(draw.random()), draw.randint(1, 300), draw.randint(1, 60), shared)
        requests.append(request)
        engine.submit(request, now)
        now += draw.expovariate(20)
        ended += engine.advance(now)
        if cancels and draw.random() < 0.3:
            engine.cancel(draw.choice(requests))
    ended += finish(engine)
    assert all(request.ended_at is not None for request in requests)
    assert (engine.running, engine.waiting, engine.cache.in_use) == (0, 0, 0)
    if not cancels:
        computed = sum(request.prompt_tokens - request.cached_tokens for request in requests)
        assert engine.computed_tokens == computed
    assert engine._context == pytest.approx(0)
