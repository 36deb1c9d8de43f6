"""Requests to other URLs than chat completions: address, bound of their tokens, usage."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from fanfold.backends.core.request_urls import (
    REQUEST_KINDS,
    URL_FIELD,
    bound_usage,
    get_kind,
    join_url,
    read_input_text,
)
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.transport import read_usage


@pytest.mark.parametrize(
    ("base", "url", "address"),
    [
        ("http://a:8000/v1", "/v1/embeddings", "http://a:8000/v1/embeddings"),
        ("http://a:8000/v1", "/score", "http://a:8000/score"),
        ("http://a:8000/v1", "/v2/rerank", "http://a:8000/v2/rerank"),
        ("https://a/proxy/v1", "/v1/completions", "https://a/proxy/v1/completions"),
        ("https://a/proxy/v1", "/rerank", "https://a/proxy/rerank"),
        ("https://a/openai/v4", "/v1/embeddings", "https://a/openai/v4/embeddings"),
    ],
)
def test_the_address_of_a_url(base: str, url: str, address: str) -> None:
    assert join_url(base, url) == address


def bound(url: str, **body: Any) -> Usage:
    kind = get_kind({URL_FIELD: url})
    assert kind is REQUEST_KINDS[url]
    return bound_usage(body, kind)


def test_a_bound_counts_each_byte_and_each_text() -> None:
    texts = ["a" * 100, "é" * 100]
    size = len(orjson.dumps(texts))
    assert bound("/v1/embeddings", input=texts) == Usage(size + 2 * 64, 0)
    numbers = [[1, 2, 3], [4]]
    assert bound("/v1/embeddings", input=numbers[0]) == Usage(len("[1,2,3]") + 64, 0)
    assert bound("/v1/embeddings", input=numbers) == Usage(len("[[1,2,3],[4]]") + 128, 0)


def test_a_query_counts_once_for_each_document() -> None:
    query, documents = "q" * 50, ["d" * 10] * 7
    most = bound("/rerank", query=query, documents=documents)
    assert most.prompt == 7 * len(f'"{query}"') + len(orjson.dumps(documents)) + 7 * 64
    pairs = bound("/v1/score", text_1=["a"] * 3, text_2=["b"] * 3)
    assert pairs.prompt == 2 * len('["a","a","a"]') + 3 * 64
    parts = {"content": [{"type": "text", "text": "b"}] * 5}
    one = len(orjson.dumps("a"))
    assert bound("/score", data_1="a", data_2=parts).prompt == (
        5 * one + len(orjson.dumps(parts)) + 5 * 64
    )


def test_a_completion_may_write_for_each_prompt() -> None:
    assert bound("/v1/completions", prompt=["a", "b"], max_tokens=10, n=3).completion == 60
    assert bound("/v1/completions", prompt="a").completion == 16


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "total_tokens": 5}, Usage(5, 0)),
        ({"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0}, Usage(5, 0)),
        ({"total_tokens": 9}, Usage(9, 0)),
        ({"total_tokens": "many"}, Usage()),
        ({"prompt_tokens": -1}, Usage()),
        (None, Usage()),
    ],
)
def test_the_usage_of_an_answer_without_a_completion(usage: Any, expected: Usage) -> None:
    assert read_usage({"data": [], "usage": usage}) == expected


def test_the_texts_of_a_request() -> None:
    body = {"query": "q", "documents": ["one", {"text": "two"}], "model": "m"}
    assert read_input_text(body, REQUEST_KINDS["/rerank"]) == "q\none\ntwo"
