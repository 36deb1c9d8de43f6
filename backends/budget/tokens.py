"""Prompt tokens: exact, tiktoken, or estimated."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp
import orjson
import tiktoken
from tiktoken.model import encoding_name_for_model

from ...configs.prices import find_provider_name
from ..core.protocols import PromptCounter
from ..discovery.connect import ReadyEndpoints
from ..fleet.endpoint import Endpoint, EndpointSpec
from ..fleet.policy import FleetPolicy
from ..fleet.transport import Transport

logger = logging.getLogger(__name__)

LoadEncoding = Callable[[str], tiktoken.Encoding]


def find_encoding_name(model: str) -> str | None:
    """Return the name of a model's vocabulary, or None when tiktoken does not know the model.

    What stands before a slash (``openai/gpt-oss-120b``) is left away.
    """
    try:
        return encoding_name_for_model(model.rpartition("/")[2])
    except KeyError:
        return None


async def load_encoding(
    name: str, timeout_s: float, load: LoadEncoding = tiktoken.get_encoding
) -> tiktoken.Encoding | None:
    """Load a vocabulary, which tiktoken downloads once and keeps; log why it cannot be had.

    tiktoken itself waits for a network that swallows packets as long as the system does, hence in
    a thread that nobody waits for at the end.

    Args:
        name: The vocabulary.
        timeout_s: Longest wait in seconds.
        load: Loads it; blocks.
    """
    loaded = Future[tiktoken.Encoding]()

    def run() -> None:
        loaded.set_running_or_notify_cancel()
        try:
            loaded.set_result(load(name))
        except Exception as error:  # noqa: BLE001 - handed over to whoever waits
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
    ) as error:  # network and disk; a vocabulary that is not the real one
        reason = f"{type(error).__name__}: {error}"
    logger.warning(
        "tiktoken cannot load the vocabulary %s, which it downloads once; tokens are counted by "
        "length, too high rather than too low. Without a network, set TIKTOKEN_CACHE_DIR to a "
        "folder that holds it. (%s)",
        name,
        reason[:200],
    )
    return None


_RUN: Final = re.compile(r"[A-Za-z]+|\s?[0-9]+|[^\x00-\x7f]+|[^\sA-Za-z0-9]|\n\s*|  +")
_MESSAGE: Final = 8
"""Tokens that a chat template puts around a message."""
_CONVERSATION: Final = 8
LIKELY_SHARE: Final = 0.8
"""What the tokens usually come to, as a share of the figure given here."""
LEAST_SHARE: Final = 0.55
"""The same at the lower end."""


def estimate_text_tokens(text: str) -> int:
    """Return about how many tokens a text has, high rather than low."""
    return sum(map(_weight, _RUN.findall(text)))


def _weight(run: str) -> int:
    if not run.isascii():
        return -(-9 * len(run.encode(errors="replace")) // 20)
    if run.isalpha():
        word = run[1:].islower() or len(run) == 1
        return 1 + (len(run) - 1) // 4 if word else 1 + 3 * (len(run) - 1) // 4
    if run[-1].isdigit():
        digits = len(run) if run[0].isdigit() else len(run) - 1
        return (digits < len(run)) + -(-digits // 3)
    return 1


def estimate_prompt_tokens(body: Mapping[str, Any]) -> int:
    """Return about how many tokens a request's prompt has, high rather than low.

    Args:
        body: The request: ``messages``, and ``tools`` and ``response_format`` if there are any.
    """
    return sum_prompt_tokens(body, estimate_text_tokens)


def sum_prompt_tokens(
    body: Mapping[str, Any],
    count: Callable[[str], int],
    message: int = _MESSAGE,
    conversation: int = _CONVERSATION,
) -> int:
    """Add up the tokens of all that a request's prompt is made of.

    Args:
        body: The request.
        count: Counts the tokens of one text.
        message: Tokens that the chat template puts around each message.
        conversation: Tokens that it puts around all of them.
    """
    messages = body["messages"]
    total = sum(count(read_message_text(one)) for one in messages)
    total += conversation + message * len(messages)
    extras = (body.get(key) for key in ("tools", "response_format"))
    total += sum(count(orjson.dumps(extra).decode()) for extra in extras if extra)
    return total


def read_message_text(message: Mapping[str, Any]) -> str:
    """Return all text of a message; what is no text stands in it as JSON."""
    content, calls = message.get("content"), message.get("tool_calls")
    parts = [content] if isinstance(content, str) else list(content or ())
    texts = [p if isinstance(p, str) else _part(p) for p in parts]
    return "\n".join([*texts, *([orjson.dumps(calls).decode()] if calls else [])])


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) else orjson.dumps(part).decode()


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


class TokenCount(NamedTuple):
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
        method: By what means the last prompt was counted, in words.
    """

    def __init__(
        self,
        specs: Sequence[EndpointSpec],
        model: str,
        timeout_s: float = 5.0,
        load: LoadEncoding = tiktoken.get_encoding,
    ) -> None:
        self._model, self._timeout_s, self._load = model, timeout_s, load
        self._offering = [Endpoint(spec) for spec in specs]
        self._turn = 0
        self._transport = Transport(FleetPolicy())
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._vocabulary: asyncio.Task[tiktoken.Encoding | None] | None = None
        self.method = "by length"

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

    async def count(self, body: Mapping[str, Any]) -> TokenCount:
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
                    self.method = "by the endpoint's tokenizer"
                    return TokenCount(tokens, exact=True)
            vocabulary = await self._encoding()
        if vocabulary is not None:
            self.method = f"by tiktoken's {vocabulary.name}"
            return await _count_encoded(vocabulary, body)
        self.method = "by length"
        return TokenCount(estimate_prompt_tokens(body), exact=False)

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
        tokens = _read_count(answer.body) if answer.status == _OK else None
        if tokens is None:
            self._drop(endpoint, f"HTTP {answer.status}")
        return tokens

    def _drop(self, endpoint: Endpoint, reason: str) -> None:
        if endpoint in self._offering:
            self._offering.remove(endpoint)
            logger.info("%s counts no tokens (/tokenize: %s)", endpoint.label, reason)

    async def _encoding(self) -> tiktoken.Encoding | None:
        """Load tiktoken's vocabulary of the model, once."""
        name = find_encoding_name(self._model)
        if name is None:
            return None
        if self._vocabulary is None:
            loading = load_encoding(name, self._timeout_s, self._load)
            self._vocabulary = asyncio.create_task(loading, name=f"tiktoken {name}")
        return await asyncio.shield(self._vocabulary)


def _read_count(answer: bytes) -> int | None:
    """Return the count in an answer of ``/tokenize``, or None when it is none."""
    try:
        data = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return None
    count = data.get("count") if isinstance(data, dict) else None
    return count if type(count) is int and count >= 0 else None


async def _count_encoded(vocabulary: tiktoken.Encoding, body: Mapping[str, Any]) -> TokenCount:
    """Count by a vocabulary; what a provider makes of schemas, tools and pictures is not known."""

    def count(text: str) -> int:
        return len(vocabulary.encode_ordinary(text))

    extras = any(body.get(key) for key in ("tools", "response_format"))
    plain = all(isinstance(message.get("content"), str) for message in body["messages"])
    size = sum(len(str(message.get("content"))) for message in body["messages"])
    if size > _LONG:
        tokens = await asyncio.to_thread(sum_prompt_tokens, body, count, *_AROUND)
    else:
        tokens = sum_prompt_tokens(body, count, *_AROUND)
    return TokenCount(tokens, exact=plain and not extras)


_TOKENIZERS_ASKED: Final = 8
"""So many of the endpoints are asked; they serve the same model."""


def open_token_counter(serving: ReadyEndpoints) -> TokenCounter:
    """Return what counts the prompts' tokens; the caller closes it.

    Gateways and hosted services offer no tokenizer and are not sent the prompts in vain.

    Args:
        serving: The endpoints, and the model that they serve.
    """
    behind = serving.endpoint_set is not None and serving.endpoint_set.gateway is not None
    specs = () if behind else tuple(spec for spec in serving.specs if _is_server(spec))
    return TokenCounter(specs[:_TOKENIZERS_ASKED], serving.model)


def make_prompt_counter(counter: TokenCounter) -> PromptCounter:
    """Return a function that counts a prompt's tokens exactly, or says None."""

    async def count(body: Mapping[str, Any]) -> int | None:
        tokens, exact = await counter.count(body)
        return tokens if exact else None

    return count


def _is_server(spec: EndpointSpec) -> bool:
    return find_provider_name(urlsplit(spec.url).hostname or "") is None
