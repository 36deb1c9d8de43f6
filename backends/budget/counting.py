"""How many tokens a prompt has, by the best means that there is."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

import aiohttp
import orjson
import tiktoken

from ..fleet.endpoint import Endpoint, EndpointSpec
from ..fleet.policy import FleetPolicy
from ..fleet.transport import Transport
from .encoding import Load, encoding_name, load_encoding
from .lengths import prompt_sum, prompt_tokens

logger = logging.getLogger(__name__)

_ASKED: Final = ("messages", "tools", "chat_template", "chat_template_kwargs", "documents")
"""Fields of a request that a chat template sees."""
_AT_ONCE: Final = 32
_TRIES: Final = 2
_OK: Final = 200
_BAD_REQUEST: Final = (400, 413, 422)
_AROUND: Final = (4, 3)
"""Tokens that OpenAI documents around each message, and around a conversation."""
_LONG: Final = 50_000
"""Characters above which a text is not counted on the event loop."""


class Count(NamedTuple):
    """Tokens of a prompt.

    Attributes:
        tokens: How many.
        exact: Whether the model's own tokenizer counted all of them; else they are estimated,
            high rather than low.
    """

    tokens: int
    exact: bool


class TokenCounter:
    """Counts the tokens of prompts, by the best means that there is.

    The endpoints' own ``/tokenize`` (vLLM) sees the prompt as the model does, template included;
    tiktoken knows OpenAI's models; and length is always there.

    Args:
        specs: The endpoints to ask; none if they are known to offer nothing.
        model: The model's name.
        timeout_s: Longest wait for one answer, and for tiktoken's vocabulary, in seconds.
        load: Loads a vocabulary of tiktoken.

    Attributes:
        how: By what means the last prompt was counted, in words.
    """

    def __init__(
        self,
        specs: Sequence[EndpointSpec],
        model: str,
        timeout_s: float = 5.0,
        load: Load = tiktoken.get_encoding,
    ) -> None:
        self._model, self._timeout_s, self._load = model, timeout_s, load
        self._offering = [Endpoint(spec) for spec in specs]
        self._turn = 0
        self._transport = Transport(FleetPolicy())
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._vocabulary: asyncio.Task[tiktoken.Encoding | None] | None = None
        self.how = "by length"

    async def __aenter__(self) -> Self:
        """Return the counter itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        if self._vocabulary is not None:
            self._vocabulary.cancel()
            await asyncio.wait({self._vocabulary})
        await self._transport.aclose()

    async def count(self, body: Mapping[str, Any]) -> Count:
        """Count the tokens of a request's prompt.

        Args:
            body: The request: ``messages``, and ``tools`` and ``response_format`` if any.
        """
        async with self._gate:
            for _ in range(_TRIES):
                if not self._offering:
                    break
                tokens = await self._ask(self._next(), body)
                if tokens is not None:
                    self.how = "by the endpoint's tokenizer"
                    return Count(tokens, exact=True)
            vocabulary = await self._encoding()
        if vocabulary is not None:
            self.how = f"by tiktoken's {vocabulary.name}"
            return await _encoded(vocabulary, body)
        self.how = "by length"
        return Count(prompt_tokens(body), exact=False)

    def _next(self) -> Endpoint:
        self._turn = (self._turn + 1) % len(self._offering)
        return self._offering[self._turn]

    async def _ask(self, endpoint: Endpoint, body: Mapping[str, Any]) -> int | None:
        """Ask an endpoint; one that does not offer it, or does not answer, is asked no more."""
        asked = {key: body[key] for key in _ASKED if body.get(key)}
        asked["model"] = endpoint.spec.model or self._model
        url = re.sub(r"/v\d+$", "", endpoint.url) + "/tokenize"
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._transport.send(
                    url, orjson.dumps(asked), await endpoint.headers(), endpoint.spec.proxied
                )
        except (aiohttp.ClientError, TimeoutError) as error:
            self._drop(endpoint, f"{type(error).__name__}: {error}")
            return None
        if answer.status in _BAD_REQUEST:
            return None  # it is this prompt
        tokens = _counted(answer.body) if answer.status == _OK else None
        if tokens is None:
            self._drop(endpoint, f"HTTP {answer.status}")
        return tokens

    def _drop(self, endpoint: Endpoint, reason: str) -> None:
        if endpoint in self._offering:
            self._offering.remove(endpoint)
            logger.info("%s counts no tokens (/tokenize: %s)", endpoint.label, reason)

    async def _encoding(self) -> tiktoken.Encoding | None:
        """Load tiktoken's vocabulary of the model, once."""
        name = encoding_name(self._model)
        if name is None:
            return None
        if self._vocabulary is None:
            loading = load_encoding(name, self._timeout_s, self._load)
            self._vocabulary = asyncio.create_task(loading, name=f"tiktoken {name}")
        return await asyncio.shield(self._vocabulary)


def _counted(answer: bytes) -> int | None:
    """Return the count in an answer of ``/tokenize``, or None when it is none."""
    try:
        data = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return None
    count = data.get("count") if isinstance(data, dict) else None
    return count if type(count) is int and count >= 0 else None


async def _encoded(vocabulary: tiktoken.Encoding, body: Mapping[str, Any]) -> Count:
    """Count by a vocabulary; what a provider makes of schemas, tools and pictures is not known."""

    def count(text: str) -> int:
        return len(vocabulary.encode_ordinary(text))

    extras = any(body.get(key) for key in ("tools", "response_format"))
    plain = all(isinstance(message.get("content"), str) for message in body["messages"])
    size = sum(len(str(message.get("content"))) for message in body["messages"])
    if size > _LONG:
        tokens = await asyncio.to_thread(prompt_sum, body, count, *_AROUND)
    else:
        tokens = prompt_sum(body, count, *_AROUND)
    return Count(tokens, exact=plain and not extras)
