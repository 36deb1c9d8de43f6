from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

import pytest
import tiktoken
from aiohttp import web
from aiohttp.test_utils import TestServer

from fanfold.backends.budget.tokens import (
    TokenCounter,
    estimate_prompt_tokens,
    find_encoding_name,
    load_encoding,
    open_token_counter,
)
from fanfold.backends.core.text_tokens import estimate_text_tokens
from fanfold.backends.discovery.connect import ReadyEndpoints
from fanfold.backends.fleet.endpoint import EndpointSpec

BODY = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]}


def bytewise(name: str) -> tiktoken.Encoding:
    """A vocabulary of bytes: real, and not to be downloaded."""
    ranks = {bytes([value]): value for value in range(256)}
    return tiktoken.Encoding(name, pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize(
    ("text", "tokens"),  # what OpenAI's o200k_base makes of it
    [
        ("We sintered a garnet-type lithium conductor in air, oxygen and argon.", 15),
        ("NNC(=O)C(CC(C(=O)NN)C(=O)NN)C(=O)NN", 20),
        ("0.7318 1.4636 2.1954 2.9272 3.6590", 25),
        ("def text_tokens(text: str) -> int:", 10),
        ("请估计下列分子在水中的溶解度,并给出一个介于零和一之间的分数。", 29),
        ("MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQ", 31),
    ],
)
def test_length_is_high_rather_than_low(text: str, tokens: int) -> None:
    assert 0.95 * tokens <= estimate_text_tokens(text) <= 2 * tokens


def test_lengths_of_odd_texts() -> None:
    assert estimate_text_tokens("") == 0
    assert estimate_text_tokens(" " * 1000) <= 1
    assert estimate_text_tokens("\ud800") >= 1
    bare = estimate_prompt_tokens(BODY)
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    assert estimate_prompt_tokens(BODY | {"response_format": schema}) > bare
    assert estimate_prompt_tokens(BODY | {"tools": [{"function": {"name": "f"}}]}) > bare
    parts = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "u"}}]
    assert estimate_prompt_tokens({"messages": [{"role": "user", "content": parts}]}) > 0
    assert estimate_prompt_tokens({"messages": [{"role": "assistant", "content": None}]}) > 0


def test_which_models_tiktoken_knows() -> None:
    assert find_encoding_name("gpt-5.4-mini") == find_encoding_name("openai/gpt-4o") == "o200k_base"
    assert find_encoding_name("meta-llama/Llama-3.1-8B-Instruct") is None


async def test_tiktoken_counts_plain_messages() -> None:
    async with TokenCounter([], "gpt-4o", load=bytewise) as counter:
        plain = await counter.count(BODY)
        assert plain == (len("Be kind.hi") + 2 * 4 + 3, True)
        assert counter.method == "by tiktoken's o200k_base"
        again = await asyncio.gather(*(counter.count(BODY) for _ in range(50)))
        assert set(again) == {plain}
        formed = await counter.count(BODY | {"response_format": {"type": "json_object"}})
        assert formed == (plain.tokens, False)  # a server's schema is no part of the prompt
        long = {"messages": [{"role": "user", "content": "x" * 60_000}]}
        assert (await counter.count(long)).tokens == 60_007


SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "title": "x" * 99}}}


@pytest.mark.parametrize(
    ("url", "counted"),
    [
        ("https://api.openai.com/v1", True),
        ("https://api.mistral.ai/v1", True),
        ("http://127.0.0.1:9/v1", False),
        ("http://llm.university.example/v1", False),
    ],
)
async def test_only_hosted_services_put_the_schema_into_the_prompt(url: str, counted: bool) -> None:
    spec = EndpointSpec(url)
    ready = ReadyEndpoints((spec,), "nobody-knows-7b", simulated=False)
    async with open_token_counter(ready) as counter:
        found = await counter.count(BODY | {"response_format": SCHEMA})
    without = estimate_prompt_tokens(BODY)
    formed = estimate_prompt_tokens(BODY | {"response_format": SCHEMA})
    assert formed > without
    assert found == (formed if counted else without, False)


@pytest.mark.parametrize(
    ("kind", "more"), [("ignores", 0), ("counts", 7), ("refuses", 0), ("breaks", 0)]
)
async def test_the_server_says_what_a_schema_adds(kind: str, more: int) -> None:
    """It is asked once with the schema, and its own tokenizer decides."""
    asked = list[bool]()

    async def tokenize(request: web.Request) -> web.Response:
        formed = "response_format" in await request.json()
        asked.append(formed)
        if formed and kind in ("refuses", "breaks"):
            return web.json_response({}, status=422 if kind == "refuses" else 500)
        return web.json_response({"count": 11 + 7 * (formed and kind == "counts")})

    app = web.Application()
    app.router.add_post("/tokenize", tokenize)
    async with TestServer(app) as server:
        spec = EndpointSpec(f"{server.make_url('/v1')}")
        async with TokenCounter([spec], "m") as counter:
            body = BODY | {"response_format": SCHEMA}
            counts = await asyncio.gather(*(counter.count(body) for _ in range(5)))
            assert await counter.count(BODY) == (11, True)
    assert set(counts) == {(11 + more, True)}
    assert asked.count(True) == 1


async def test_without_a_network_length_takes_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    async with TokenCounter([], "gpt-4o", timeout_s=60) as counter:
        counts = await asyncio.gather(*(counter.count(BODY) for _ in range(3)))
    assert set(counts) == {(estimate_prompt_tokens(BODY), False)}
    assert counter.method == "by length"
    assert [r.message for r in caplog.records].count(caplog.messages[0]) == 1
    assert "cannot load the vocabulary o200k_base" in caplog.messages[0]
    assert "TIKTOKEN_CACHE_DIR" in caplog.messages[0]


async def test_a_network_that_swallows_everything_holds_nothing_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gone = threading.Event()

    def hang(name: str) -> tiktoken.Encoding:
        gone.wait(60)
        return bytewise(name)

    with caplog.at_level(logging.WARNING):
        assert await load_encoding("o200k_base", 0.01, hang) is None
    gone.set()
    assert "no answer within 0.01 s" in caplog.text


async def test_a_model_that_nobody_knows_is_counted_by_length() -> None:
    async with TokenCounter([], "meta-llama/Llama-3.1-8B-Instruct", load=bytewise) as counter:
        assert await counter.count(BODY) == (estimate_prompt_tokens(BODY), False)
