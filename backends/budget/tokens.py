"""Prompt tokens: exact, by tiktoken, or estimated."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeAlias
from urllib.parse import urlsplit

import orjson

from ...configs.prices import find_provider_name
from ..core.connection_errors import describe_connection_error
from ..core.images import count_image_tokens, drop_images
from ..core.lazy_tls import aiohttp
from ..core.parsing import read_message_text
from ..core.protocols import PromptCounter
from ..core.request_urls import URL_FIELD
from ..core.text_tokens import estimate_text_tokens
from ..discovery.connect import ReadyEndpoints
from ..fleet.endpoint import Endpoint, EndpointSpec
from ..fleet.failures import HTTPAnswer
from ..fleet.policy import FleetPolicy
from ..fleet.transport import Transport

if TYPE_CHECKING:
    import tiktoken

logger = logging.getLogger(__name__)

LoadEncoding: TypeAlias = "Callable[[str], tiktoken.Encoding]"


def find_encoding_name(model: str) -> str | None:
    """Return the name of a model's vocabulary, or None when tiktoken does not know the model.

    A prefix up to a slash (``openai/gpt-oss-120b``) is ignored.
    """
    from tiktoken.model import encoding_name_for_model  # noqa: PLC0415 - most models are not in it

    try:
        return encoding_name_for_model(model.rpartition("/")[2])
    except KeyError:
        return None


def _get_encoding(name: str) -> tiktoken.Encoding:
    import tiktoken  # noqa: PLC0415 - most models have another tokenizer

    return tiktoken.get_encoding(name)


async def load_encoding(
    name: str, timeout_s: float, load: LoadEncoding = _get_encoding
) -> tiktoken.Encoding | None:
    """Load a vocabulary, which tiktoken downloads once and caches; log why loading failed.

    On a network that drops packets, tiktoken blocks until the system's timeout. Loading therefore
    runs in a daemon thread, which the process does not wait for when it exits.

    Args:
        name: The vocabulary.
        timeout_s: Longest wait in seconds.
        load: Loads a vocabulary; blocks.
    """
    loaded = Future["tiktoken.Encoding"]()

    def run() -> None:
        loaded.set_running_or_notify_cancel()
        try:
            loaded.set_result(load(name))
        except Exception as error:  # noqa: BLE001 - passed on to the waiting task
            loaded.set_exception(error)

    threading.Thread(target=run, name=f"tiktoken {name}", daemon=True).start()
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.wrap_future(loaded)
    except TimeoutError:
        reason = f"no answer within {timeout_s:g} s"
    except (
        OSError,
        ValueError,
    ) as error:  # network or disk failed, or the vocabulary is corrupt
        reason = f"{type(error).__name__}: {error}"
    logger.warning(
        "tiktoken cannot load the vocabulary %s, which it downloads once. Token counts are "
        "estimated from text length, with a tendency to be too high. Without a network, set "
        "TIKTOKEN_CACHE_DIR to a folder that contains the vocabulary. (%s)",
        name,
        reason[:200],
    )
    return None


_MESSAGE: Final = 8
"""Tokens that a chat template adds around a message."""
_CONVERSATION: Final = 8
_EXTRAS: Final = ("tools", "response_format")
"""Fields of a request that hosted services add to the prompt."""
_EXTRAS_OF_SERVERS: Final = ("tools",)
"""The same for vLLM and its kind: a schema restricts the answer and is no part of the prompt."""
LIKELY_SHARE: Final = 0.8
"""Typical token count, as a share of the estimate."""
LEAST_SHARE: Final = 0.55
"""Lowest token count to expect, as a share of the estimate."""


def estimate_prompt_tokens(body: Mapping[str, Any], extras: Sequence[str] = _EXTRAS) -> int:
    """Estimate the tokens of a request's prompt, with a tendency to be too high.

    Args:
        body: The request: ``messages``, and optionally ``tools`` and ``response_format``.
        extras: Fields besides the messages whose text is part of the prompt.
    """
    return sum_prompt_tokens(body, estimate_text_tokens, extras=extras)


def sum_prompt_tokens(
    body: Mapping[str, Any],
    count: Callable[[str], int],
    message: int = _MESSAGE,
    conversation: int = _CONVERSATION,
    extras: Sequence[str] = _EXTRAS,
) -> int:
    """Sum the tokens of all parts of a request's prompt; those of images are an estimate.

    Args:
        body: The request.
        count: Counts the tokens of one text.
        message: Tokens that the chat template adds around each message.
        conversation: Tokens that it adds around the conversation.
        extras: Fields besides the messages whose text is part of the prompt.
    """
    messages = body["messages"]
    total = sum(count(read_message_text(one)) for one in messages)
    total += conversation + message * len(messages)
    found = (body.get(key) for key in extras)
    total += sum(count(orjson.dumps(extra).decode()) for extra in found if extra)
    return total + count_image_tokens(messages)


_ASKED: Final = ("messages", "tools", "chat_template", "chat_template_kwargs", "documents")
"""Fields of a request that a chat template uses."""
_AT_ONCE: Final = 32
_TRIES: Final = 2
_OK: Final = 200
_BAD_REQUEST: Final = (400, 413, 422)
_AROUND: Final = (4, 3)
"""Tokens that OpenAI documents for each message and for each conversation."""
_LONG: Final = 50_000
"""Length in characters above which a text is counted in a thread, not on the event loop."""


class TokenCount(NamedTuple):
    """Tokens of a prompt.

    Attributes:
        tokens: Number of tokens.
        exact: Whether the model's own tokenizer counted all of them; otherwise an estimate with
            a tendency to be too high.
    """

    tokens: int
    exact: bool


class TokenCounter:
    """Count the tokens of prompts by the best method available.

    The endpoints' own ``/tokenize`` (vLLM) counts the prompt as the model does, template included.
    tiktoken covers OpenAI's models. An estimate by text length is always available.

    Args:
        specs: Endpoints to ask; empty if they are known to have no tokenizer.
        model: The model's name.
        timeout_s: Longest wait for one answer, and for tiktoken's vocabulary, in seconds.
        load: Loads a tiktoken vocabulary.
        hosted: Whether a hosted service answers, which adds the schema's text to the prompt.

    Attributes:
        method: Method used for the last prompt, in words.
    """

    def __init__(
        self,
        specs: Sequence[EndpointSpec],
        model: str,
        timeout_s: float = 5.0,
        load: LoadEncoding = _get_encoding,
        *,
        hosted: bool = False,
    ) -> None:
        self._extras = _EXTRAS if hosted else _EXTRAS_OF_SERVERS
        self._schema_tokens = dict[bytes, int]()
        self._schema_lock = asyncio.Lock()
        self._model, self._timeout_s, self._load = model, timeout_s, load
        self._offering = [Endpoint(spec) for spec in specs]
        self._turn = 0
        self._transport = Transport(FleetPolicy())
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._vocabulary: asyncio.Task[tiktoken.Encoding | None] | None = None
        self.method = "by length"

    async def __aenter__(self) -> Self:
        """Return the counter."""
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

    async def count(self, body: Mapping[str, Any]) -> TokenCount:
        """Count the tokens of a request's prompt.

        Args:
            body: The request: ``messages``, and optionally ``tools`` and ``response_format``.
        """
        images = count_image_tokens(body["messages"])
        async with self._gate:
            for _ in range(_TRIES):
                if not self._offering:
                    break
                tokens = await self._ask(self._next(), body)
                if tokens is not None:
                    self.method = "by the endpoint's tokenizer"
                    if images:
                        self.method += ", images by their size"
                    return TokenCount(tokens + images, exact=not images)
            vocabulary = await self._encoding()
        if vocabulary is not None:
            self.method = f"by tiktoken's {vocabulary.name}"
            return await _count_encoded(vocabulary, body, self._extras)
        self.method = "by length"
        return TokenCount(estimate_prompt_tokens(body, self._extras), exact=False)

    def _next(self) -> Endpoint:
        self._turn = (self._turn + 1) % len(self._offering)
        return self._offering[self._turn]

    async def _ask(self, endpoint: Endpoint, body: Mapping[str, Any]) -> int | None:
        """Ask an endpoint; stop using one that has no tokenizer or does not answer."""
        asked = {key: body[key] for key in _ASKED if body.get(key)}
        asked["messages"] = drop_images(body["messages"])  # nobody counts megabytes of base64
        try:
            answer = await self._tokenize(endpoint, asked)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._drop(endpoint, describe_connection_error(error))
            return None
        if answer.status in _BAD_REQUEST:
            return None  # this prompt is the problem, not the endpoint
        tokens = _read_count(answer)
        if tokens is None:
            self._drop(endpoint, f"HTTP {answer.status}")
            return None
        if schema := body.get("response_format"):
            tokens += await self._count_schema(endpoint, asked, schema, tokens)
        return tokens

    async def _tokenize(self, endpoint: Endpoint, asked: Mapping[str, Any]) -> HTTPAnswer:
        url = re.sub(r"/v\d+$", "", endpoint.url) + "/tokenize"
        data = orjson.dumps({**asked, "model": endpoint.spec.model or self._model})
        async with asyncio.timeout(self._timeout_s):
            return await self._transport.send(
                url, data, await endpoint.headers(), endpoint.spec.proxied
            )

    async def _count_schema(
        self, endpoint: Endpoint, asked: Mapping[str, Any], schema: Any, plain: int
    ) -> int:
        """Return the tokens that a schema adds to the prompt; ask once for each schema.

        Args:
            endpoint: The endpoint to ask.
            asked: A prompt without the schema.
            schema: The request's ``response_format``.
            plain: Tokens of the prompt without it.
        """
        key = orjson.dumps(schema)
        async with self._schema_lock:
            if key not in self._schema_tokens:
                more: int | None = None
                try:
                    answer = await self._tokenize(endpoint, {**asked, "response_format": schema})
                    more = _read_count(answer)
                except (aiohttp.ClientError, TimeoutError) as error:
                    why = describe_connection_error(error)
                    logger.info("%s: no count of the schema's tokens (%s)", endpoint.label, why)
                # A server that refuses the field here does not count it in the prompt either.
                self._schema_tokens[key] = max(0, (more or 0) - plain)
            return self._schema_tokens[key]

    def _drop(self, endpoint: Endpoint, reason: str) -> None:
        if endpoint in self._offering:
            self._offering.remove(endpoint)
            logger.info("%s: no token counts from /tokenize (%s)", endpoint.label, reason)

    async def _encoding(self) -> tiktoken.Encoding | None:
        """Load tiktoken's vocabulary for the model, once."""
        name = find_encoding_name(self._model)
        if name is None:
            return None
        if self._vocabulary is None:
            loading = load_encoding(name, self._timeout_s, self._load)
            self._vocabulary = asyncio.create_task(loading, name=f"tiktoken {name}")
        return await asyncio.shield(self._vocabulary)


def _read_count(answer: HTTPAnswer) -> int | None:
    """Return the count in an answer of ``/tokenize``, or None if the answer has no count."""
    if answer.status != _OK:
        return None
    try:
        data = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return None
    count = data.get("count") if isinstance(data, dict) else None
    return count if type(count) is int and count >= 0 else None


async def _count_encoded(
    vocabulary: tiktoken.Encoding, body: Mapping[str, Any], extras: Sequence[str]
) -> TokenCount:
    """Count by a vocabulary; not exact for schemas, tools and images, whose form is unknown."""

    def count(text: str) -> int:
        return len(vocabulary.encode_ordinary(text))

    formed = any(body.get(key) for key in _EXTRAS)
    plain = all(isinstance(message.get("content"), str) for message in body["messages"])
    size = sum(len(str(message.get("content"))) for message in body["messages"])
    if size > _LONG:
        tokens = await asyncio.to_thread(sum_prompt_tokens, body, count, *_AROUND, extras)
    else:
        tokens = sum_prompt_tokens(body, count, *_AROUND, extras)
    return TokenCount(tokens, exact=plain and not formed)


_TOKENIZERS_ASKED: Final = 8
"""Number of endpoints asked at most; all serve the same model."""


def open_token_counter(serving: ReadyEndpoints) -> TokenCounter:
    """Return a token counter for prompts; the caller closes it.

    Gateways and hosted services have no tokenizer, so they are not asked.

    Args:
        serving: The endpoints and their model.
    """
    behind = serving.endpoint_set is not None and serving.endpoint_set.gateway is not None
    specs = () if behind else tuple(spec for spec in serving.specs if _is_server(spec))
    hosted = not behind and any(not _is_server(spec) for spec in serving.specs)
    return TokenCounter(specs[:_TOKENIZERS_ASKED], serving.model, hosted=hosted)


def make_prompt_counter(counter: TokenCounter) -> PromptCounter:
    """Return a function that counts a prompt's tokens exactly, or returns None."""

    async def count(body: Mapping[str, Any]) -> int | None:
        if URL_FIELD in body:
            return None  # only prompts of chats are counted
        tokens, exact = await counter.count(body)
        return tokens if exact else None

    return count


def _is_server(spec: EndpointSpec) -> bool:
    return find_provider_name(urlsplit(spec.url).hostname or "") is None
