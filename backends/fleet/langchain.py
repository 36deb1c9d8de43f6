"""ChatFleet (ChatOpenAI over a fleet), its openai transport, LangChainClient."""

from __future__ import annotations

import copy
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any, Final, Self, TypeAlias, TypeVar, cast

import httpx2
import openai
import orjson
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import Field, model_validator

from ..core.errors import ConfigurationError, EndpointError, EndpointLostError
from ..core.types import SIMULATED_FINGERPRINT, Message, Reply, Usage
from ..core.values import parse_token_count
from .failures import HTTPAnswer
from .fleet import Fleet
from .policy import ModelParams
from .transport import OpenStream

UNRESOLVABLE_URL: Final = "http://fleet.invalid/v1"
"""Base URL of the stock clients: a name that never resolves (RFC 6761, 6.4)."""

PLACEHOLDER_KEY: Final = "no-key-is-ever-sent"

ReplayOutcome: TypeAlias = EndpointError | dict[str, Any]

_REPLAY: ContextVar[ReplayOutcome | None] = ContextVar("fanfold_replay", default=None)
LAST_ENDPOINT: Final[ContextVar[str | None]] = ContextVar("fanfold_served_by", default=None)
"""Label of the endpoint that answered the last request of this context."""
LAST_ERROR: Final[ContextVar[EndpointError | None]] = ContextVar("fanfold_failed", default=None)
"""Why the last request of this context has failed, or None."""

_HOP_HEADERS: Final = frozenset({"content-encoding", "content-length", "transfer-encoding"})


@contextmanager
def replay_outcome(outcome: ReplayOutcome) -> Iterator[None]:
    """Make the next request of this context return an outcome that is already known."""
    token = _REPLAY.set(outcome)
    try:
        yield
    finally:
        _REPLAY.reset(token)


class OpenAITransport(httpx2.AsyncBaseTransport):
    """Sends the openai package's requests through a fleet.

    Args:
        fleet: The endpoints.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer one request.

        Raises:
            ConfigurationError: The request is not a chat completion.
            httpx2.TransportError: No endpoint answered.
            RunStoppedError: No item can succeed any more.
        """
        if not request.url.path.endswith("/chat/completions"):
            raise ConfigurationError(
                f"a fleet serves chat completions only, not {request.url.path}"
            )
        outcome = _REPLAY.get()
        if outcome is not None:
            return _response(outcome, request)
        body = orjson.loads(await request.aread())
        LAST_ERROR.set(None)
        try:
            if body.get("stream"):
                stream, server = await self._fleet.get_loop_fleet().open_stream(body)
                LAST_ENDPOINT.set(server.label)
                return httpx2.Response(
                    200, headers=_end_to_end(stream.headers), stream=_Lines(stream)
                )
            document, endpoint = await self._fleet.get_loop_fleet().post(body)
        except EndpointError as error:
            LAST_ERROR.set(error)
            return _response(error, request, streamed=bool(body.get("stream")))
        LAST_ENDPOINT.set(endpoint.label if endpoint else None)
        return _response(document, request)


class NoSyncTransport(httpx2.BaseTransport):
    """Refuses requests: synchronous calls go through the asynchronous client."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Refuse the request.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            f"{request.url.path}: a fleet has no synchronous client of its own"
        )


class _Lines(httpx2.AsyncByteStream):
    """The lines of an open stream as a body for httpx2."""

    def __init__(self, stream: OpenStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for line in self._stream.lines():
                yield line
        except EndpointLostError as error:
            raise httpx2.ReadError(error.message) from error

    async def aclose(self) -> None:
        self._stream.close()


def _response(
    outcome: ReplayOutcome, request: httpx2.Request, *, streamed: bool = False
) -> httpx2.Response:
    """Return a response for ChatOpenAI, which reads a body without events as an empty stream."""
    if isinstance(outcome, dict):
        headers = {"content-type": "application/json"}
        return httpx2.Response(200, headers=headers, content=orjson.dumps(outcome))
    raw = outcome.__cause__
    if not isinstance(raw, HTTPAnswer) or (
        raw.status < 400 and (streamed or _is_partial(outcome))  # noqa: PLR2004
    ):
        kind = httpx2.ReadTimeout if isinstance(raw, TimeoutError) else httpx2.ConnectError
        raise kind(outcome.message, request=request) from outcome
    return httpx2.Response(raw.status, headers=_end_to_end(raw.headers), content=raw.body)


def _is_partial(error: EndpointError) -> bool:
    """Return True if an answer looks complete but is not: ChatOpenAI would accept it."""
    return isinstance(error, EndpointLostError)


def _end_to_end(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(k, v) for k, v in headers.items() if k.lower() not in _HOP_HEADERS]


_F = TypeVar("_F", bound=Callable[..., Any])

_FLEET_SETTINGS: Final = (
    "base_url",
    "openai_api_base",
    "api_key",
    "openai_api_key",
    "timeout",
    "request_timeout",
    "max_retries",
    "http_client",
    "http_async_client",
    "openai_proxy",
    "default_headers",
    "default_query",
)
_NOT_PER_CALL: Final = frozenset({"extra_headers", "extra_query", "timeout"})
_RESPONSES_ONLY: Final = ("context_management", "include", "reasoning", "truncation")
_TOKEN_DETAILS: Final = (
    ("completion_tokens_details", dict.fromkeys(CompletionTokensDetails.model_fields)),
    ("prompt_tokens_details", dict.fromkeys(PromptTokensDetails.model_fields)),
)
_STOCK_ERRORS: Final = (openai.OpenAIError, ValueError, TypeError, LookupError)


def _with_signature(function: _F) -> _F:
    """Inspect a function's signature once: LangChain does so at every call."""
    vars(function)["__signature__"] = inspect.signature(function)
    return function


class ChatFleet(ChatOpenAI):
    """A chat model served by a fleet of endpoints.

    Give it to any LangGraph agent in place of a ChatOpenAI; it adds balancing, failover and rate
    limits. It never reads OPENAI_API_KEY or OPENAI_BASE_URL.

    Args:
        fleet: The endpoints. The caller opens and closes it.
        **settings: ChatOpenAI's settings: model, temperature, max_tokens, extra_body, …

    Raises:
        ConfigurationError: A setting belongs to the fleet (base_url, api_key, timeout, max_retries,
            …) or asks for the Responses API.
    """

    fleet: Fleet = Field(exclude=True, repr=False)

    @classmethod
    def of(cls, fleet: Fleet, params: ModelParams) -> Self:
        """Build the model with the request parameters ``params``.

        The answer's schema is put into the body unchanged, so that a truncated answer is returned
        with its finish reason instead of being lost in an exception; but not into requests with
        tools.
        """
        body = params.body()
        named: dict[str, Any] = {k: body.pop(k) for k in ("temperature", "seed") if k in body}
        if (most := body.pop("max_completion_tokens", None)) is not None:
            named["max_tokens"] = most
        return cls(fleet=fleet, model=body.pop("model"), extra_body=body or None, **named)

    @model_validator(mode="before")
    @classmethod
    def _replace_stock_clients(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Give ChatOpenAI's own clients no address, no key and no connection."""
        if given := [k for k in _FLEET_SETTINGS if values.get(k) is not None]:
            raise ConfigurationError(
                f"ChatFleet does not accept {', '.join(given)}: addresses, keys, timeouts and "
                "retries belong to the fleet (EndpointSpec, FleetPolicy)"
            )
        transport = OpenAITransport(values["fleet"])
        # ChatOpenAI pops what it knows out of the caller's own model_kwargs.
        settings = {k: copy.deepcopy(v) if k == "model_kwargs" else v for k, v in values.items()}
        return (
            {"stream_usage": True, "use_responses_api": False}
            | settings
            | {
                "openai_api_base": UNRESOLVABLE_URL,
                "openai_api_key": PLACEHOLDER_KEY,
                "openai_proxy": None,
                "max_retries": 0,
                "http_client": httpx2.Client(transport=NoSyncTransport(), trust_env=False),
                "http_async_client": httpx2.AsyncClient(transport=transport, trust_env=False),
            }
        )

    @model_validator(mode="after")
    def _refuse_responses_api(self) -> Self:
        self._use_responses_api({})
        return self

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return False: a fleet holds live connections."""
        return False

    def _use_responses_api(self, payload: dict[str, Any]) -> bool:
        asked = [k for k in _RESPONSES_ONLY if getattr(self, k) is not None or k in payload]
        builtin = [t for t in payload.get("tools") or () if t.get("type") != "function"]
        if (
            asked
            or builtin
            or self.use_responses_api
            or self.use_previous_response_id
            or self.output_version == "responses/v1"
            or "previous_response_id" in payload
            or "text" in payload
        ):
            why = ", ".join(asked) or "use_responses_api, output_version or a built-in tool"
            raise ConfigurationError(
                f"a fleet supports chat completions, not the Responses API: remove {why}"
            )
        return False

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        if foreign := sorted(_NOT_PER_CALL & payload.keys()):
            raise ConfigurationError(
                f"{', '.join(foreign)} cannot be set per call: they belong to the fleet"
            )
        body = payload.get("extra_body") or {}
        if "max_tokens" in body and "max_completion_tokens" in payload:
            # a call's own limit, in the field that the servers accept
            most = payload.pop("max_completion_tokens")
            payload["extra_body"] = body = {**body, "max_tokens": most}
        if "tools" in payload and "response_format" in body:
            # a server that constrains all output to the schema does not allow tool calls
            payload["extra_body"] = {k: v for k, v in body.items() if k != "response_format"}
        return payload

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        """Answer a call that may be streamed to callbacks; streaming does not change its result.

        An answer that breaks off is requested again as a whole, as without streaming.
        """
        ask = super()._agenerate_with_cache
        try:
            return await ask(messages, stop, run_manager, **kwargs)
        except _STOCK_ERRORS as error:
            if not _has_broken_off(error) or kwargs.get("stream"):
                raise
        return await ask(messages, stop, run_manager, **{**kwargs, "stream": False})

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        ask = super()._generate_with_cache
        try:
            return ask(messages, stop, run_manager, **kwargs)
        except _STOCK_ERRORS as error:
            if not _has_broken_off(error) or kwargs.get("stream"):
                raise
        return ask(messages, stop, run_manager, **{**kwargs, "stream": False})

    @_with_signature
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        payload = self._get_request_payload(messages, stop=stop, **kwargs)
        if self._needs_stock(payload):
            with _set_fleet_cause():
                result = await super()._agenerate(messages, stop, run_manager, **kwargs)
            return _set_endpoint(result, LAST_ENDPOINT.get())
        payload.pop("stream", None)
        payload.update(payload.pop("extra_body", None) or {})
        try:
            document, endpoint = await self.fleet.get_loop_fleet().post(payload)
        except EndpointError as error:
            with _set_fleet_cause(error), replay_outcome(error):
                _check_not_empty(await super()._agenerate(messages, stop, run_manager, **kwargs))
            raise  # ChatOpenAI's parser is more tolerant, but the answer counts as a failure
        if "response_format" in kwargs and _is_unfinished(document):
            with replay_outcome(document):
                return await super()._agenerate(messages, stop, run_manager, **kwargs)
        return _set_endpoint(self._read(document, payload), endpoint.label if endpoint else None)

    def _needs_stock(self, payload: dict[str, Any]) -> bool:
        """Return True if the openai package must build the body or parse the answer."""
        answer_format = payload.get("response_format")
        return (
            bool(self.include_response_headers)
            or isinstance(answer_format, type)
            or (answer_format is not None and "tools" in payload)
        )

    def _read(self, document: dict[str, Any], payload: dict[str, Any]) -> ChatResult:
        """Parse an answer as ChatOpenAI does after its round trip through pydantic models."""
        for key in ("id", "model", "system_fingerprint"):
            document.setdefault(key, None)
        if usage := document.get("usage"):
            for key, parts in _TOKEN_DETAILS:
                if (details := usage.setdefault(key, None)) is not None:
                    usage[key] = parts | details
        for choice in document["choices"]:
            if (logprobs := choice.setdefault("logprobs", None)) is not None:
                logprobs.setdefault("refusal", None)
        result = self._create_chat_result(document)
        first = result.generations[0].message.additional_kwargs
        if "response_format" in payload and "response_format" not in (self.extra_body or {}):
            first["parsed"] = None
        first["refusal"] = document["choices"][0]["message"].get("refusal")
        for generation, choice in zip(result.generations, document["choices"], strict=True):
            if reasoning := choice["message"].get("reasoning"):
                generation.message.response_metadata["reasoning"] = reasoning
        return result

    def _convert_chunk_to_generation_chunk(
        self,
        chunk: dict[str, Any],
        default_chunk_class: type,
        base_generation_info: dict[str, Any] | None,
    ) -> ChatGenerationChunk | None:
        made = super()._convert_chunk_to_generation_chunk(
            chunk, default_chunk_class, base_generation_info
        )
        choices = chunk.get("choices")
        if made is not None and choices and (reasoning := choices[0]["delta"].get("reasoning")):
            # LangChain joins the texts of all chunks
            made.message.response_metadata["reasoning"] = reasoning
        return made

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        stream = super()._astream(*args, **kwargs)
        with _set_fleet_cause():
            async with aclosing(cast(AsyncGenerator[ChatGenerationChunk, None], stream)):
                first = True
                async for chunk in stream:
                    if first:
                        chunk.message.response_metadata["endpoint"] = LAST_ENDPOINT.get()
                        first = False
                    yield chunk

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - the parent's signature
        **kwargs: Any,
    ) -> ChatResult:
        return self.fleet.portal.run(self._agenerate(messages, stop, None, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self.fleet.portal.iterate(self._astream(messages, stop, None, **kwargs)):
            if run_manager is not None:
                logprobs = (chunk.generation_info or {}).get("logprobs")
                run_manager.on_llm_new_token(chunk.text, chunk=chunk, logprobs=logprobs)
            yield chunk


@contextmanager
def _set_fleet_cause(error: EndpointError | None = None) -> Iterator[None]:
    """Set the fleet's own error as the cause of ChatOpenAI's exception."""
    try:
        yield
    except _STOCK_ERRORS as stock:
        cause = error or _find(stock) or LAST_ERROR.get()
        if cause is not None and stock.__cause__ is not cause:
            raise stock from cause
        raise


def _find(error: BaseException) -> EndpointError | None:
    link: BaseException | None = error
    while link is not None and not isinstance(link, EndpointError):
        link = link.__cause__
    return link


def _has_broken_off(error: BaseException) -> bool:
    """Return True if a part of a streamed answer had come when it failed."""
    cause = _find(error)
    return isinstance(cause, EndpointLostError) and cause.has_partial_answer


def _set_endpoint(result: ChatResult, endpoint: str | None) -> ChatResult:
    for generation in result.generations:
        generation.message.response_metadata["endpoint"] = endpoint
    return result


def _check_not_empty(result: ChatResult) -> None:
    """Fail where ``ainvoke`` would, so that the fleet's error can be set as the cause."""
    result.generations[0]


def _is_unfinished(document: dict[str, Any]) -> bool:
    """Return True if ChatOpenAI raises for this answer to a request with a schema."""
    reasons = {choice.get("finish_reason") for choice in document["choices"]}
    return bool(reasons & {"length", "content_filter"})


class LangChainClient:
    """Chat client through a LangChain model, so that callbacks, traces and streams see the call.

    LangGraph's ambient configuration applies because ``ainvoke`` reads it.

    Args:
        chat: The model.
    """

    def __init__(self, chat: ChatFleet) -> None:
        self._chat = chat

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Answer one conversation.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: No item can succeed any more.
        """
        try:
            answer = await self._chat.ainvoke(list(messages))
        except (openai.OpenAIError, ValueError, TypeError, LookupError) as error:
            if isinstance(error.__cause__, EndpointError):
                raise error.__cause__ from error.__cause__.__cause__
            raise
        return _reply(answer)


def _reply(answer: AIMessage) -> Reply:
    about: dict[str, Any] = answer.response_metadata
    return Reply(
        content=str(answer.text),  # a plain str: orjson takes no subclass
        finish_reason=about.get("finish_reason"),
        refusal=answer.additional_kwargs.get("refusal"),
        usage=_usage(answer.usage_metadata),
        endpoint=about.get("endpoint") or "",
        model=about.get("model_name") or "",
        simulated=about.get("system_fingerprint") == SIMULATED_FINGERPRINT,
        cached=about.get("endpoint") is None,
        reasoning=about.get("reasoning"),
        logprobs=about.get("logprobs"),
    )


def _usage(usage: UsageMetadata | None) -> Usage:
    if usage is None:
        return Usage()
    cached = usage.get("input_token_details", {}).get("cache_read")
    return Usage(
        parse_token_count(usage["input_tokens"]),
        parse_token_count(usage["output_tokens"]),
        parse_token_count(cached),
    )
