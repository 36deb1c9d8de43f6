"""URLs of requests other than chat completions, such as embeddings: what fanfold needs to know."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from .types import CHAT_URL, Json, Usage

URL_FIELD: Final = "fanfold:url"
"""Field of a request in this process that names its URL if that is not chat completions. It is not
sent."""


@dataclass(frozen=True, slots=True)
class RequestKind:
    """What requests to one URL are like.

    Attributes:
        answer: The member of an answer that shows that it is one: a list; with ``file``, a text.
        inputs: Members of a request whose texts the model reads.
        generates: Whether the model writes tokens, as many as ``max_tokens``.
        pairs: Whether the model reads each text of a list together with the other members.
        file: The member that names a file by its URL; the request is then sent as a form, with the
            content as its member ``file``. How many tokens it is is not known before the answer.
    """

    answer: str
    inputs: tuple[str, ...]
    generates: bool = False
    pairs: bool = False
    file: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """Return the members of which a request has at least one."""
        return self.inputs if self.file is None else (self.file,)


_SCORE: Final = RequestKind(
    "data", ("text_1", "text_2", "queries", "documents", "data_1", "data_2"), pairs=True
)
_RERANK: Final = RequestKind("results", ("query", "documents"), pairs=True)
_AUDIO: Final = RequestKind("text", ("prompt", "language"), file="file_url")

REQUEST_KINDS: Final[Mapping[str, RequestKind]] = {
    "/v1/completions": RequestKind("choices", ("prompt", "suffix"), generates=True),
    "/v1/embeddings": RequestKind("data", ("input", "messages")),
    "/score": _SCORE,
    "/v1/score": _SCORE,
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/v1/audio/transcriptions": _AUDIO,
    "/v1/audio/translations": _AUDIO,
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
_MOST_URL: Final = 8192
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


def find_file_problem(url: object, hosts: Collection[str]) -> str | None:
    """Return why a file is not loaded from a URL, or None.

    Args:
        url: The URL.
        hosts: Hosts from which files may be fetched.
    """
    if not isinstance(url, str) or not url.startswith(("data:", "http://", "https://")):
        return "give the URL of a file: data:TYPE;base64,… or https://HOST/…"
    if url.startswith("data:"):
        return None if url.partition(",")[0].endswith(";base64") else "the data URL is not base64"
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    is_plain = len(url) <= _MOST_URL and url.isascii() and url.isprintable()
    if not host or not is_plain or " " in url or "\\" in url or "@" in parts.netloc:
        return "the URL is malformed: name a host, no user, and write it in ASCII, escaped"
    if host in hosts:
        return None
    if ":" in host:
        return (
            f"files are not fetched from IPv6 addresses ({host}); name the host, or give a data URL"
        )
    return (
        f"files are not fetched from {host}; allow it with --allowed-media-domains {host} "
        "(batch.allowed_media_domains), or give the content as a data URL"
    )


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
