"""URLs of requests other than chat completions, such as embeddings: what fanfold needs to know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from .types import CHAT_URL, Json, Usage

URL_FIELD: Final = "fanfold:url"
"""Field of a request in this process that names its URL if that is not chat completions. It is not
sent."""


@dataclass(frozen=True, slots=True)
class RequestKind:
    """What requests to one URL are like.

    Attributes:
        answer: The member of an answer that shows that it is one: a list.
        inputs: Members of a request whose texts the model reads.
        generates: Whether the model writes tokens, as many as ``max_tokens``.
        pairs: Whether the model reads each text of a list together with the other members.
    """

    answer: str
    inputs: tuple[str, ...]
    generates: bool = False
    pairs: bool = False


_SCORE: Final = RequestKind(
    "data", ("text_1", "text_2", "queries", "documents", "data_1", "data_2"), pairs=True
)
_RERANK: Final = RequestKind("results", ("query", "documents"), pairs=True)

REQUEST_KINDS: Final[Mapping[str, RequestKind]] = {
    "/v1/completions": RequestKind("choices", ("prompt", "suffix"), generates=True),
    "/v1/embeddings": RequestKind("data", ("input", "messages")),
    "/score": _SCORE,
    "/v1/score": _SCORE,
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
}
"""The kinds by URL."""
REQUEST_URLS: Final = (CHAT_URL, *REQUEST_KINDS)
"""All URLs to which fanfold sends requests."""

GATEWAY_URLS: Final = (CHAT_URL, "/v1/completions", "/v1/embeddings")
"""URLs that both a FIRST gateway and fanfold have."""

_LISTS: Final = ("data", "results")
"""Members that only answers to other requests than completions have."""
_TEMPLATE: Final = 64
"""Tokens that a server may add around a text: markers, a fixed instruction."""
_DEFAULT_ANSWER: Final = 16
"""Longest answer of a completion that sets none, in tokens, as OpenAI and vLLM document it."""


def get_kind(body: Mapping[str, Any]) -> RequestKind | None:
    """Return the kind of a request; None: it asks for a chat completion."""
    url = body.get(URL_FIELD)
    return None if url is None else REQUEST_KINDS[url]


def join_url(base: str, url: str) -> str:
    """Return the address of a URL at an endpoint.

    Args:
        base: The endpoint's base URL, which usually ends in ``/v1``.
        url: One of `REQUEST_URLS`.
    """
    if url.startswith("/v1/"):
        return base + url.removeprefix("/v1")
    return base.removesuffix("/v1") + url


def bound_usage(body: Mapping[str, Any], kind: RequestKind) -> Usage:
    """Return the most tokens that a request may use: each byte is one token at most."""
    sizes = dict[str, int]()
    count = 1
    for name in kind.inputs:
        if (value := body.get(name)) is not None:
            sizes[name] = len(orjson.dumps(value))
            count = max(count, _count_texts(value))
    prompt = sum(
        size * count if kind.pairs and _count_texts(body[name]) < count else size
        for name, size in sizes.items()
    )
    answer = 0
    if kind.generates:
        most = body.get("max_tokens") or _DEFAULT_ANSWER
        answer = int(most) * count * int(body.get("n") or 1)
    return Usage(prompt + count * _TEMPLATE, answer)


def _count_texts(value: Json) -> int:
    """Return how many texts a member of a request holds; a list of token numbers is one text."""
    if isinstance(value, dict):  # several parts, each a text or an image
        return max(1, *(_count_texts(one) for one in value.values())) if value else 1
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return len(value)
    return 1


def read_input_text(body: Mapping[str, Any], kind: RequestKind) -> str:
    """Return the texts of a request that the model reads, for an estimate of their tokens."""
    return "\n".join(text for name in kind.inputs for text in _list_texts(body.get(name)))


def _list_texts(value: Json) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _list_texts(one)


def read_kind_usage(document: Mapping[str, Any], usage: Usage) -> Usage:
    """Return the usage of an answer without ``completion_tokens``: all of its tokens are a prompt.

    Args:
        document: The answer.
        usage: What was read of it as of a chat completion.
    """
    reported = document.get("usage")
    has_list = any(isinstance(document.get(name), list) for name in _LISTS)
    if not has_list or usage.completion is not None or not isinstance(reported, dict):
        return usage
    total = reported.get("total_tokens")
    prompt = usage.prompt if usage.prompt is not None else total
    if isinstance(prompt, bool) or not isinstance(prompt, int) or prompt < 0:
        return usage
    return Usage(prompt, 0, usage.cached)
