"""HTTP session (aiohttp), SSE streams, parsing of completions."""

from __future__ import annotations

import asyncio
import io
import re
from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.request import getproxies, proxy_bypass

import orjson
from yarl import URL

from ..core.errors import ConfigurationError, EndpointError, EndpointLostError
from ..core.lazy_tls import aiohttp
from ..core.request_urls import REQUEST_KINDS, read_kind_usage
from ..core.types import CHAT_URL, SIMULATED_FINGERPRINT, Reply, Usage
from ..core.values import cut_deep_levels, parse_json, parse_token_count, to_json_text
from . import failures
from .failures import BodyTooLargeError, ErrorBody, Failure, HTTPAnswer, ProxyError
from .policy import FleetPolicy, SessionPolicy

_LARGE: Final = 1 << 20
"""Bytes above which aiohttp warns about a body that is sent in one piece."""

_OK: Final = 200
_LARGEST_DOCUMENT: Final = 8 * 2**20
"""Limit of bytes of a list of models, of metrics or of a registry's answer."""
_LONGEST_HEADER: Final = 64 * 1024
"""Limit of bytes of one header of an answer; proxies add long ones (security policies, traces)."""
_LARGEST_ERROR: Final = 64 * 1024
"""Limit of bytes that are read of an error's body; messages quote its beginning."""


class BodyReader:
    """Reads an answer's body up to a limit.

    Bytes count after decompression, so that a small compressed body cannot fill the memory.

    Args:
        response: The answer, its body unread.
        most: Limit of bytes.

    Attributes:
        response: The answer.
    """

    def __init__(self, response: aiohttp.ClientResponse, most: int) -> None:
        self.response = response
        self._most = self._left = most
        self._lines = deque[bytes]()
        self._begun = list[bytes]()

    async def read(self) -> bytes:
        """Read the whole body, or the beginning of an error's body.

        Raises:
            BodyTooLargeError: It is larger than the limit; the connection is closed.
            aiohttp.ClientError: The connection broke.
        """
        response, length = self.response, self.response.content_length
        if length is not None and length <= self._left and _is_plain(response):
            return await response.read()
        blocks, size = list[bytes](), 0
        while block := await self._block():
            blocks.append(block)
            size += len(block)
            if response.status != _OK and size > _LARGEST_ERROR:
                response.close()
                break
        return b"".join(blocks)

    async def read_line(self) -> bytes:
        """Read up to the next line end, which is included; return ``b""`` at the body's end.

        Raises:
            BodyTooLargeError: The lines so far are larger than the limit; the connection is closed.
            aiohttp.ClientError: The connection broke.
        """
        while not self._lines:
            block = await self._block()
            if not block:
                last, self._begun = b"".join(self._begun), []
                return last
            *ended, rest = block.split(b"\n")
            for piece in ended:
                self._lines.append(b"".join((*self._begun, piece, b"\n")))
                self._begun.clear()
            if rest:
                self._begun.append(rest)
        return self._lines.popleft()

    async def _block(self) -> bytes:
        block = await self.response.content.readany()
        self._left -= len(block)
        if self._left < 0:
            self.response.close()
            raise BodyTooLargeError(self._most)
        return block


def _is_plain(response: aiohttp.ClientResponse) -> bool:
    return response.headers.get("Content-Encoding", "identity").lower() == "identity"


class Transport:
    """Sends requests, without balancing or retries.

    The connection pool is unlimited on purpose: the fleet limits requests in flight, and a second
    limit below it would only hide where calls wait.

    Args:
        policy: Timeouts, the largest answer, and whether proxy variables apply.
    """

    def __init__(self, policy: FleetPolicy) -> None:
        self._policy = policy
        self._session: aiohttp.ClientSession | None = None
        self._proxies: dict[str, dict[str, Any]] = {}
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def silence_s(self) -> float:
        """Return the longest silence inside a stream, in seconds."""
        return self._policy.timeout.chunk_s

    @property
    def session_policy(self) -> SessionPolicy | None:
        """Return the sessions of the requests, or None."""
        return self._policy.session

    async def send(
        self, url: str, body: bytes, headers: Mapping[str, str], proxied: bool = False
    ) -> HTTPAnswer:
        """Post one body and read the whole answer.

        Args:
            url: The address.
            body: The request.
            headers: Its headers.
            proxied: Whether the environment's proxy variables apply.

        Raises:
            aiohttp.ClientError: The connection failed or broke, or the answer is too large.
            TimeoutError: No answer in time.
        """
        async with self.session().post(
            url,
            data=_to_payload(body),
            allow_redirects=False,
            **self._route_options(url, headers, proxied),
        ) as response:
            reader = BodyReader(response, self._policy.body_bytes)
            sent = response.request_info.headers
            return HTTPAnswer(response.status, response.headers, await reader.read(), sent)

    async def stream(
        self, url: str, body: bytes, headers: Mapping[str, str], proxied: bool = False
    ) -> BodyReader:
        """Post one body and return the reader of the answer; the caller closes the answer.

        The timeout for the whole answer applies to the silence between two chunks instead.

        Raises:
            aiohttp.ClientError: The connection failed or broke.
            TimeoutError: No answer in time.
        """
        limits = self._policy.timeout
        timeout = aiohttp.ClientTimeout(sock_connect=limits.connect_s, sock_read=limits.request_s)
        response = await self.session().post(
            url,
            data=_to_payload(body),
            allow_redirects=False,
            timeout=timeout,
            **self._route_options(url, headers, proxied),
        )
        return BodyReader(response, self._policy.body_bytes)

    async def get(
        self, url: str, headers: Mapping[str, str], timeout_s: float, proxied: bool = False
    ) -> HTTPAnswer:
        """Fetch a small document within ``timeout_s`` seconds.

        Raises:
            aiohttp.ClientError: The connection failed or broke, or the document is too large.
            TimeoutError: No answer in time.
        """
        async with self.session().get(
            url,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            **self._route_options(url, headers, proxied),
        ) as response:
            body = await BodyReader(response, _LARGEST_DOCUMENT).read()
            sent = response.request_info.headers
            return HTTPAnswer(response.status, response.headers, body, sent)

    async def fetch(self, url: str, timeout_s: float, most: int) -> HTTPAnswer:
        """Fetch a file of a server that is no endpoint: with no key, by the environment's proxy.

        Args:
            url: The address.
            timeout_s: Longest wait, in seconds.
            most: Limit of bytes.

        Raises:
            aiohttp.ClientError: The connection failed or broke, or the file is too large.
            TimeoutError: No answer in time.
        """
        address = URL(url, encoded=True)  # a signature may cover the URL as it is written
        async with self.session().get(
            address,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(
                total=timeout_s, sock_connect=self._policy.timeout.connect_s
            ),
            **_proxy_of(address),
        ) as response:
            body = await BodyReader(response, most).read()
            return HTTPAnswer(response.status, response.headers, body)

    def _route_options(self, url: str, headers: Mapping[str, str], proxied: bool) -> dict[str, Any]:
        """Return a request's headers, and its proxy if the environment names one, for aiohttp."""
        if not (proxied or self._policy.trust_env):
            return {"headers": headers}
        if url not in self._proxies:
            self._proxies[url] = _proxy_of(URL(url))
        found = self._proxies[url]
        return found | {"headers": {**headers, **found.get("headers", {})}}

    def session(self) -> aiohttp.ClientSession:
        """Return the session of the running loop, opening it at the first call.

        Raises:
            ConfigurationError: The session belongs to another loop that still runs.
        """
        if self._session is not None and self.loop is asyncio.get_running_loop():
            return self._session
        return self._open()

    def _open(self) -> aiohttp.ClientSession:
        here = asyncio.get_running_loop()
        if self.loop is not here:
            if self.loop is not None and not self.loop.is_closed():
                raise ConfigurationError(
                    "a fleet was used from two event loops at once: build one Fleet per loop"
                )
            self.loop = here
        limits = self._policy.timeout
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=limits.keepalive_s),
            timeout=aiohttp.ClientTimeout(total=limits.request_s, sock_connect=limits.connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            max_line_size=_LONGEST_HEADER,
            max_field_size=_LONGEST_HEADER,
        )
        return self._session

    async def aclose(self) -> None:
        """Close all connections; a later request opens new ones."""
        session, self._session, self.loop = self._session, None, None
        if session is not None:
            await session.close()


def _proxy_of(url: URL) -> dict[str, Any]:
    """Return aiohttp's arguments for the proxy that the environment names for a URL.

    User and password move from the proxy's URL to a header, since errors show the URL.

    Raises:
        ProxyError: The variable does not name an HTTP proxy.
    """
    text = getproxies().get(url.scheme)
    if not text or proxy_bypass(f"{url.host}:{url.port}"):
        return {}
    try:
        proxy = URL(text if "://" in text else f"http://{text}")
        usable = proxy.scheme == "http" and bool(proxy.host)
    except ValueError:
        usable = False
    if not usable:
        name = f"{url.scheme}_proxy"
        msg = (
            f"the environment variable {name} (or {name.upper()}) does not name an HTTP proxy such "
            "as http://proxy.example:3128; correct it, or add the host to no_proxy"
        )
        raise ProxyError(msg)
    if proxy.user is None and proxy.password is None:
        return {"proxy": proxy}
    pair = b64encode(f"{proxy.user or ''}:{proxy.password or ''}".encode()).decode()
    login = {"Proxy-Authorization": f"Basic {pair}"}
    bare = proxy.with_user(None)
    return {"proxy": bare, "proxy_headers" if url.scheme == "https" else "headers": login}


def _to_payload(body: bytes) -> bytes | io.BytesIO:
    """Return a body for aiohttp; a large one is read in pieces so as not to block the loop."""
    return io.BytesIO(body) if len(body) > _LARGE else body


GATEWAY_ERROR_ID: Final = "chatcmpl-api-error"
"""Id under which the FIRST gateway hides an error of the server behind it."""

_COUNTS: Final = ("prompt_tokens", "completion_tokens", "total_tokens")
_DETAILS: Final = ("prompt_tokens_details", "completion_tokens_details")

ABORT_REASONS: Final = frozenset({"abort", "error"})
"""Finish reasons of a server that is shutting down; the text is partial."""


CONTENT_FIELDS: Final = ("content", "tool_calls", "refusal", "function_call", "audio")
"""Fields of a message that hold content."""


def read_answer(answer: HTTPAnswer, endpoint: str, url: str = CHAT_URL) -> dict[str, Any] | Failure:
    """Decode an answer, or return why it is not one.

    Args:
        answer: The answer as it came, with any status.
        endpoint: The endpoint's label.
        url: The URL of the request, without that of the endpoint.
    """
    if (kind := REQUEST_KINDS.get(url)) is None:
        return read_completion(answer, endpoint)
    if answer.status != _OK:
        failure = failures.classify_answer(answer.mask_keys(), endpoint)
        return failures.classify_unserved(failure, url)
    try:
        document = _read_text_answer(answer) if kind.file is not None else None
        document = document or parse_json(answer.body)
    except RecursionError:
        return failures.classify_too_deep(answer.mask_keys(), endpoint)
    except ValueError:
        document = None
    form: type[list[Any] | str] = list if kind.file is None else str
    if isinstance(document, dict) and isinstance(document.get(kind.answer), form):
        cut_deep_levels(answer.body, document)
        if _is_cut_off(document):
            return failures.classify_abort(answer.mask_keys(), endpoint)
        return document
    problem = f"the answer has no {'list' if form is list else 'text'} {kind.answer!r}"
    return _classify_unreadable(document, answer.mask_keys(), problem, endpoint)


_TEXT_TYPES: Final = frozenset({"text/plain", "text/vtt", "text/srt", "application/x-subrip"})


def _read_text_answer(answer: HTTPAnswer) -> dict[str, Any] | None:
    """Return a transcription that a server sent as plain text or subtitles; None: it is JSON."""
    media = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return {"text": answer.body.decode(errors="replace")} if media in _TEXT_TYPES else None


def _is_cut_off(document: Mapping[str, Any]) -> bool:
    """Return True if a server that shuts down has ended one of the texts of an answer."""
    choices = document.get("choices")
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") in ABORT_REASONS
        for choice in choices
    )


def read_completion(answer: HTTPAnswer, endpoint: str) -> dict[str, Any] | Failure:
    """Decode an answer, or return why it is not a completion.

    Args:
        answer: The answer as it came, with any status. It may be an event stream, although none was
            requested.
        endpoint: The endpoint's label.
    """
    if answer.status != 200:  # noqa: PLR2004 - HTTP's own number
        return failures.classify_answer(answer.mask_keys(), endpoint)
    document = _read_body(answer, endpoint)
    if isinstance(document, Failure):
        return document
    problem = _problem(document)
    if problem is None:
        normalize_completion(document)
        cut_deep_levels(answer.body, document)
        if _is_aborted(document):
            return failures.classify_abort(answer.mask_keys(), endpoint)
        plain: dict[str, Any] = document
        return plain
    return _classify_unreadable(document, answer.mask_keys(), problem, endpoint)


def _classify_unreadable(document: Any, answer: HTTPAnswer, problem: str, endpoint: str) -> Failure:
    """Return why an answer with status 200 is none: an error in its body, or another document."""
    if isinstance(document, dict) and (document.get("error") or document.get("object") == "error"):
        error_body = ErrorBody.from_json(parse_json(answer.body))
        return failures.classify_error_body(answer, error_body, _inner_status(error_body), endpoint)
    return failures.classify_bad_reply(answer, problem, endpoint)


def _read_body(answer: HTTPAnswer, endpoint: str) -> Any:
    """Return the JSON document that a body is, or the failure; None if it is neither."""
    try:
        return parse_json(answer.body)
    except RecursionError:
        return failures.classify_too_deep(answer.mask_keys(), endpoint)
    except ValueError:
        return _assemble_stream(answer, endpoint)


def _problem(document: Any) -> str | None:
    if not isinstance(document, dict):
        return "the answer is not a JSON object"
    if document.get("error"):
        return "an error in an answer with status 200"
    choices = document.get("choices")
    if not isinstance(choices, list) or not choices:
        return "the answer has no choices"
    return None if any(map(_has_message, choices)) else "the answer has no message"


def _has_message(choice: Any) -> bool:
    return isinstance(choice, dict) and isinstance(choice.get("message"), dict)


def normalize_completion(document: dict[str, Any]) -> None:
    """Give a chat completion's fields the types of the specification, in place.

    Servers and proxies may send other types. The answer is paid, so it should count: an invalid
    count is removed, a name that is not text becomes null, choices without a message and malformed
    tool calls are removed, and content that is not text becomes its JSON text. Reasoning that is
    sent apart from the answer becomes the message's field ``reasoning``.
    """
    _normalize_top(document)
    choices = document["choices"] = [one for one in document["choices"] if _has_message(one)]
    for choice in choices:
        message = choice["message"]
        if message.get("role") != "assistant":
            message["role"] = "assistant"
        if calls := message.get("tool_calls"):
            message["tool_calls"] = _normalize_calls(calls)
        if call := message.get("function_call"):
            message["function_call"] = _normalize_function(call)
        _normalize_choice(choice, message)


def normalize_chunk(chunk: dict[str, Any]) -> None:
    """Normalize the fields of one stream event in place, as :func:`normalize_completion` does.

    Unlike in a whole answer, each part of a tool call may be missing: another event brings it.
    """
    _normalize_top(chunk)
    chunk.pop("chunk", None)  # LangChain would search it for choices
    choices = chunk.get("choices")
    choices = chunk["choices"] = (
        [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    )
    for choice in choices:
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = choice["delta"] = {"content": delta} if isinstance(delta, str) else {}
        if delta.get("role", "assistant") != "assistant":
            delta["role"] = "assistant"
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = _normalize_call_parts(calls)
        if call := delta.get("function_call"):
            delta["function_call"] = _normalize_function_part(call)
        _normalize_choice(choice, delta)
        if logprobs := choice.get("logprobs"):  # LangChain concatenates those of all events
            lists = {name: one for name, one in logprobs.items() if isinstance(one, list)}
            choice["logprobs"] = lists or None


def _normalize_top(document: dict[str, Any]) -> None:
    for name in ("model", "system_fingerprint", "id", "service_tier"):
        if not isinstance(document.get(name, ""), str):
            document[name] = None
    usage = document.get("usage")
    if usage is not None and not _is_usage(usage):
        document["usage"] = _normalize_usage(usage)


def _normalize_choice(choice: dict[str, Any], message: dict[str, Any]) -> None:
    """Normalize the fields of a choice and of its message or delta."""
    reason, logprobs = choice.get("finish_reason"), choice.get("logprobs")
    if reason is not None and not isinstance(reason, str):
        only = reason[0] if isinstance(reason, list) and len(reason) == 1 else None
        choice["finish_reason"] = only if isinstance(only, str) else to_json_text(reason)
    if logprobs is not None and not isinstance(logprobs, dict):
        choice["logprobs"] = None
    thoughts = next((text for name in _REASONING if (text := _read_text(message.get(name)))), "")
    for name in ("content", "refusal"):
        value = message.get(name)
        if value is None or isinstance(value, str):
            continue
        joined = _join_parts(value)
        message[name] = to_json_text(value) if joined is None else joined
        thoughts = thoughts or _join_thoughts(value)
    if thoughts or message.get("reasoning") is not None:
        message["reasoning"] = thoughts or None
    if (audio := message.get("audio")) is not None and not isinstance(audio, dict):
        message["audio"] = None
    for name in ("name", "id"):
        if not isinstance(message.get(name, ""), str):
            message[name] = None


def _normalize_calls(calls: Any) -> list[dict[str, Any]] | None:
    """Return the tool calls of a message, or None if one is malformed."""
    if not isinstance(calls, list):
        return None
    found = []
    for call in calls:
        function = _normalize_function(call.get("function")) if isinstance(call, dict) else None
        if function is None:
            return None
        name = call.get("id")
        plain_id = name if name is None or isinstance(name, str) else to_json_text(name)
        arguments = _normalize_arguments(function["arguments"])
        found.append({**call, "id": plain_id, "function": {**function, "arguments": arguments}})
    return found


def _normalize_arguments(text: str) -> str:
    """Return a tool's arguments as the JSON text of an object, or as text that is not JSON.

    LangChain makes an invalid tool call, which the model can correct, of text that is not JSON, but
    raises an exception for JSON that is not an object.
    """
    if text.lstrip()[:1] in ("{", ""):
        return text
    try:
        value = orjson.loads(text)
        if isinstance(value, str) and isinstance(orjson.loads(value), dict):
            return value  # encoded twice
    except orjson.JSONDecodeError:
        return text if text.lstrip()[:1] != '"' else f"{text} is not an object"
    return f"{text} is not an object" if value and not isinstance(value, dict) else text


def _normalize_function(function: Any) -> dict[str, Any] | None:
    """Return a function call with its arguments as JSON text, or None if it is malformed."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return function
    return {**function, "arguments": to_json_text({} if arguments is None else arguments)}


def _normalize_call_parts(calls: Any) -> list[dict[str, Any]] | None:
    """Return the parts of tool calls in an event, or None if one is malformed."""
    if not isinstance(calls, list):
        return None
    found = []
    for place, call in enumerate(calls):
        function = (
            _normalize_function_part(call.get("function")) if isinstance(call, dict) else None
        )
        if function is None:
            return None
        index, name = call.get("index"), call.get("id")
        found.append(
            {
                **call,
                "index": index if type(index) is int else place,
                "id": name if name is None or isinstance(name, str) else to_json_text(name),
                "function": function,
            }
        )
    return found


def _normalize_function_part(function: Any) -> dict[str, Any] | None:
    if function is None:
        return {}
    if not isinstance(function, dict):
        return None
    name, arguments = function.get("name"), function.get("arguments")
    if arguments is not None and not isinstance(arguments, str):
        arguments = to_json_text(arguments)
    return {**function, "name": name if isinstance(name, str) else None, "arguments": arguments}


_REASONING: Final = ("reasoning_content", "reasoning")
"""Fields of a message in which servers send the reasoning apart from the answer."""

_THOUGHTS: Final = frozenset({"thinking", "redacted_thinking", "reasoning", "thought"})
"""Types of content parts that precede the answer and are not part of it."""


def _join_parts(content: Any) -> str | None:
    """Return the text of a content that is a list of parts, or None for other content."""
    if not isinstance(content, list):
        return None
    texts = [_read_text(part) for part in content if not _is_thought(part)]
    found = [text for text in texts if text is not None]
    return "".join(found) if found or not texts else None


def _join_thoughts(content: Any) -> str:
    """Return the text of all thoughts in a content that is a list of parts."""
    parts = content if isinstance(content, list) else ()
    return "\n\n".join(
        text for part in parts if _is_thought(part) and (text := _read_thought(part))
    )


def _is_thought(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    return (isinstance(kind, str) and kind in _THOUGHTS) or part.get("thought") is True


def _read_thought(part: Mapping[str, Any]) -> str:
    """Return the text of a thought; servers name its field in several ways."""
    for name in ("thinking", "reasoning", "text", "summary", "content"):
        value = part.get(name)
        texts = map(_read_text, value) if isinstance(value, list) else [_read_text(value)]
        if found := "\n".join(text for text in texts if text):
            return found
    return ""


def _read_text(part: Any) -> str | None:
    """Return the text of a content part, or None if it has none."""
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, dict):
        text = text.get("value")
    return text if isinstance(text, str) else None


def _is_usage(usage: Any) -> bool:
    """Return True if all used fields of a usage are valid, as nearly always."""
    if not isinstance(usage, dict):
        return False
    for name in _COUNTS:
        if (value := usage.get(name)) is not None and parse_token_count(value) is None:
            return False
    return all(_are_details(usage.get(name)) for name in _DETAILS)


def _are_details(details: Any) -> bool:
    return details is None or (
        isinstance(details, dict)
        and all(value is None or parse_token_count(value) is not None for value in details.values())
    )


def _normalize_usage(usage: Any) -> dict[str, Any] | None:
    """Return the valid fields of a usage."""
    if not isinstance(usage, dict):
        return None
    plain: dict[str, Any] = {
        name: value for name in _COUNTS if (value := parse_token_count(usage.get(name))) is not None
    }
    for name in _DETAILS:
        if isinstance(details := usage.get(name), dict):
            plain[name] = {k: v for k, v in details.items() if parse_token_count(v) is not None}
    return plain


def is_completion(document: Any) -> bool:
    """Return True if a value is a chat completion."""
    return _problem(document) is None


def _is_aborted(document: dict[str, Any]) -> bool:
    reason = document["choices"][0].get("finish_reason")
    aborted = isinstance(reason, str) and reason in ABORT_REASONS
    return aborted or document.get("id") == GATEWAY_ERROR_ID


def is_empty(document: Mapping[str, Any]) -> bool:
    """Return True if a good answer has no content although it was not cut.

    Answers to other requests than chat completions count as they are.
    """
    choice = document["choices"][0] if document.get("choices") else {}
    message = choice.get("message")
    if message is None:
        return False
    regular = choice.get("finish_reason") in ("stop", None)
    return regular and not any(map(message.get, CONTENT_FIELDS))


def is_cut(document: Mapping[str, Any]) -> bool:
    """Return True if a good answer ends at its limit of tokens."""
    return any(choice.get("finish_reason") == "length" for choice in document.get("choices") or ())


def _inner_status(error_body: ErrorBody) -> int:
    code = error_body.code or ""
    # only three decimal digits: int() refuses other digits, and thousands of them
    return int(code) if re.fullmatch(r"[45][0-9]{2}", code) else 500


def is_simulated(document: Mapping[str, Any]) -> bool:
    """Return True if a simulated fleet made this answer."""
    return document.get("system_fingerprint") == SIMULATED_FINGERPRINT


def read_usage(document: Mapping[str, Any]) -> Usage:
    """Return the tokens that an answer reports; unknown values stay None."""
    usage = document.get("usage")
    if not isinstance(usage, dict):
        return Usage()
    details = usage.get("prompt_tokens_details")
    cached = parse_token_count(details.get("cached_tokens")) if isinstance(details, dict) else None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))  # the latter of audio
    completion = usage.get("completion_tokens", usage.get("output_tokens"))
    read = Usage(parse_token_count(prompt), parse_token_count(completion), cached)
    return read_kind_usage(document, read)


def make_reply(document: dict[str, Any], endpoint: str) -> Reply:
    """Turn a chat completion into a reply; of other answers it has the usage and the model.

    Args:
        document: The decoded answer, already checked.
        endpoint: Label of the endpoint that gave it.
    """
    choice = document["choices"][0] if document.get("choices") else {}
    message = choice.get("message") or {}
    return Reply(
        content=message.get("content") or "",
        finish_reason=choice.get("finish_reason"),
        refusal=message.get("refusal"),
        usage=read_usage(document),
        endpoint=endpoint,
        model=document.get("model") or "",
        simulated=is_simulated(document),
        reasoning=message.get("reasoning"),
        logprobs=choice.get("logprobs"),
    )


_DATA: Final = b"data:"
_DONE: Final = b"data: [DONE]"
"""The event that ends a stream; some servers write it without the space."""
_MARK: Final = b"\xef\xbb\xbf"
"""A byte order mark, which may precede the first line."""
_FIELDS: Final = (b"data:", b"event:", b"id:", b"retry:", b":")
"""Valid beginnings of a line in an event stream."""

OnEnd = Callable[[dict[str, Any] | Failure | None], None]


@dataclass(frozen=True, slots=True)
class StreamHooks:
    """Callbacks of a stream.

    Attributes:
        on_idle: Called when the stream is not being read.
        on_read: Called when it is read again, or has ended.
        on_end: Called once: with model and usage of a whole answer, with the failure that
            interrupted it, or with None if the caller left early.
    """

    on_idle: Callable[[], None]
    on_read: Callable[[], None]
    on_end: OnEnd


class OpenStream:
    """A stream whose first token has come; holds its endpoint until closed.

    Args:
        reader: Reads the rest of the answer.
        head: The lines up to the first token's.
        endpoint: Label of the endpoint.
        silence_s: Longest wait for a further line, in seconds.
        hooks: Callbacks on its progress.

    Attributes:
        headers: The answer's headers.
        is_empty: Whether the answer has ended without content.
    """

    def __init__(
        self,
        reader: BodyReader,
        head: Sequence[bytes],
        endpoint: str,
        silence_s: float,
        hooks: StreamHooks,
    ) -> None:
        self._reader, self._response = reader, reader.response
        self._answer = _bare_answer(reader.response)
        self._head = head
        self._endpoint = endpoint
        self._silence_s = silence_s
        self._hooks = hooks
        self._collected: dict[str, Any] = {}
        self._failure: Failure | None = None
        self._open = True
        self._reading = False
        self._has_content = False
        self._ended = set[str]()
        self.headers = {key.lower(): value for key, value in reader.response.headers.items()}
        self.headers["content-type"] = "text/event-stream"
        self.is_empty = False
        hooks.on_idle()

    @classmethod
    async def begin(
        cls, reader: BodyReader, endpoint: str, silence_s: float, hooks: StreamHooks
    ) -> OpenStream | Failure:
        """Read up to the first token, or return why there is none.

        Earlier events (the speaker's role) are held back, so that the call may still move to
        another endpoint.
        """
        response = reader.response
        answer = _bare_answer(response)
        if response.status != _OK:
            raw = answer.replace_body(response.status, await reader.read())
            return failures.classify_answer(raw.mask_keys(), endpoint)
        head: list[bytes] = []
        started = False
        while line := await reader.read_line():
            if not started:
                line = line.removeprefix(_MARK)
                if line.strip() and not line.startswith(_FIELDS):
                    return await cls._from_document(reader, line, endpoint, silence_s, hooks)
            started = started or bool(line.strip())
            head.append(line)
            try:
                chunk = _decode(line) if line.startswith(_DATA) else None
                failure = _error_event(chunk, line, answer, endpoint)
            except ValueError:
                chunk, failure = None, failures.classify_bad_event(endpoint)
            if failure is not None:
                response.close()
                return failure
            has_content, reason = _has_any_content(chunk), _reason(chunk)
            if has_content or reason:
                stream = cls(reader, head, endpoint, silence_s, hooks)
                stream.is_empty = not has_content and reason == "stop"
                return stream
            if _is_done(line):
                break
        if started:
            response.close()
            return failures.classify_early_end(endpoint)
        return failures.classify_bad_reply(answer, "the stream is empty", endpoint)

    @classmethod
    async def _from_document(
        cls, reader: BodyReader, first: bytes, endpoint: str, silence_s: float, hooks: StreamHooks
    ) -> OpenStream | Failure:
        """Treat a body that is not an event stream as the whole answer, or return the failure."""
        lines = [first]
        while line := await reader.read_line():
            lines.append(line)
        answer = _bare_answer(reader.response)
        document = read_completion(answer.replace_body(answer.status, b"".join(lines)), endpoint)
        if isinstance(document, Failure):
            return document
        events = [_event(chunk) for chunk in _chunks_of(document)]
        events.append(_DONE + b"\n\n")
        stream = cls(reader, events, endpoint, silence_s, hooks)
        stream.is_empty = is_empty(document)
        return stream

    async def drain(self) -> None:
        """Read the rest of an answer that no caller needs, so that its usage is known."""
        try:
            async for _ in self.lines():
                pass
        except EndpointLostError:
            return  # it is counted as lost

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the stream's events, and close it at the end.

        Raises:
            EndpointLostError: The stream was cut or timed out.
        """
        try:
            for line in self._head:
                if event := self._process_line(line):
                    yield event
            while self._open and (line := await self._next()):
                if event := self._process_line(line):
                    yield event
            self._check_end()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._failure = failures.classify_exception(
                error, self._endpoint, self._response.request_info.headers
            )
            raise _mark_partial(self._failure) from error
        finally:
            self.close()

    async def _next(self) -> bytes:
        self._reading = True
        self._hooks.on_read()
        try:
            async with asyncio.timeout(self._silence_s):
                return await self._reader.read_line()
        finally:
            self._reading = False
            if self._open:
                self._hooks.on_idle()

    def _check_end(self) -> None:
        if self._failure is None and not self._collected.get("finished"):
            self._failure = failures.classify_early_end(self._endpoint)
        if self._failure is not None:
            raise _mark_partial(self._failure)

    def close(self) -> None:
        """Release the endpoint; closing early frees the server's slot too."""
        if not self._open:
            return
        self._open = False
        if not self._reading:
            self._hooks.on_read()
        whole = self._failure is None and self._collected.get("finished")
        if not self._response.content.at_eof():
            self._response.close()
        self._hooks.on_end(self._failure or (self._collected if whole else None))

    def _process_line(self, line: bytes) -> bytes:
        """Record model, fingerprint, usage and the end; return the line's event."""
        if _is_done(line):
            # Readers stop here, so a missing part must be reported here. Content has come, and the
            # server says that it has sent all: it names no finish reason.
            self._collected["finished"] = True
            self._check_end()
            return _DONE + b"\n\n"
        if line.startswith(_DATA):
            try:
                chunk = _decode(line)
            except ValueError:
                self._failure = failures.classify_bad_event(self._endpoint)
                raise _mark_partial(self._failure) from None
            if chunk is None:
                return b""  # a heartbeat, not part of an answer
            for key in ("model", "system_fingerprint", "usage"):
                if chunk.get(key):
                    self._collected[key] = chunk[key]
            if failure := _error_event(chunk, line, self._answer, self._endpoint):
                self._failure = failure
                if isinstance(answer := failure.error.__cause__, HTTPAnswer):
                    chunk = _decode(_DATA + answer.body) or chunk  # without the key
            choices = chunk.get("choices") or [{}]
            reason = choices[0].get("finish_reason")
            self._drop_repeated_reason(choices)
            if isinstance(reason, str) and reason in ABORT_REASONS:
                self._failure = failures.classify_early_end(self._endpoint)
            elif reason:
                self._collected["finished"] = True
            if _is_whole(choices):
                self._collected["finished"] = True
                return b"".join(_event(one) for one in _chunks_of(chunk, self._has_content))
            self._has_content = self._has_content or bool(choices[0].get("delta"))
            return _event(chunk)
        return b""  # readers need only an event's data

    def _drop_repeated_reason(self, choices: list[dict[str, Any]]) -> None:
        """Drop a repeated finish reason: LangChain would concatenate them."""
        for choice in choices:
            if choice.get("finish_reason"):
                index = str(choice.get("index"))
                if index in self._ended:
                    choice["finish_reason"] = None
                self._ended.add(index)


def _mark_partial(failure: Failure) -> EndpointError:
    """Return a failure's error, marked as raised after a part of the answer was read."""
    if isinstance(failure.error, EndpointLostError):
        failure.error.has_partial_answer = True
    return failure.error


def _event(document: Mapping[str, Any]) -> bytes:
    return _DATA + b" " + orjson.dumps(document) + b"\n\n"


def _chunks_of(document: Mapping[str, Any], streamed: bool = False) -> Iterator[dict[str, Any]]:
    """Return the events that stream a whole completion.

    Args:
        document: The completion.
        streamed: Whether its text has already come, token by token.
    """
    head = {**document, "object": "chat.completion.chunk"}
    usage = head.pop("usage", None)
    choices = []
    for choice in (one for one in document["choices"] if isinstance(one, dict)):
        rest = {key: value for key, value in choice.items() if key not in {"message", "delta"}}
        message = dict(choice.get("message") or {})
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [{"index": n, **call} for n, call in enumerate(calls)]
        choices.append({"index": 0, **rest, "delta": {} if streamed else message})
    yield {**head, "choices": choices}
    if usage:
        yield {**head, "choices": [], "usage": usage}


def _decode(line: bytes) -> dict[str, Any] | None:
    """Return the normalized data of an event; None if it is not an object.

    Raises:
        ValueError: It cannot be parsed.
    """
    data = line[len(_DATA) :].strip()
    if not data.startswith(b"{"):
        return None
    try:
        document: dict[str, Any] = parse_json(data)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    choices = document.get("choices")
    if isinstance(choices, list) and _is_whole(choices):
        normalize_completion(document)
    else:
        normalize_chunk(document)
    cut_deep_levels(data, document)
    return document


def _is_done(line: bytes) -> bool:
    return line.startswith(_DATA) and line[len(_DATA) :].strip() == b"[DONE]"


def _bare_answer(response: aiohttp.ClientResponse) -> HTTPAnswer:
    """Return an answer without its body, which is read apart."""
    return HTTPAnswer(response.status, response.headers, b"", response.request_info.headers)


def _is_whole(choices: Sequence[Any]) -> bool:
    """Return True if an event holds the whole message in place of a part of it."""
    first = next((one for one in choices if isinstance(one, dict)), {})
    return isinstance(first.get("message"), dict) and not first.get("delta")


def _has_any_content(chunk: Mapping[str, Any] | None) -> bool:
    """Return True if an event brings a token, a call or a refusal."""
    if chunk is None:
        return False
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or choice.get("message")
        if isinstance(delta, dict) and any(map(delta.get, CONTENT_FIELDS)):
            return True
    return False


def _reason(chunk: Mapping[str, Any] | None) -> Any:
    """Return the finish reason in an event, or None."""
    choices = (chunk or {}).get("choices") or ()
    return next((c["finish_reason"] for c in choices if c.get("finish_reason")), None)


def _error_event(
    document: dict[str, Any] | None, line: bytes, answer: HTTPAnswer, endpoint: str
) -> Failure | None:
    """Return the failure that an event of an answer reports, or None."""
    if document is None:
        return None
    body = line[len(_DATA) :].strip()
    if document.get("id") == GATEWAY_ERROR_ID:
        return failures.classify_abort(answer.replace_body(_OK, body).mask_keys(), endpoint)
    if not (document.get("error") or document.get("object") == "error"):
        return None
    raw = answer.replace_body(500, body).mask_keys()
    error_body = ErrorBody.from_json(parse_json(raw.body))
    raw.status = _inner_status(error_body)
    return failures.classify_error_body(raw, error_body, raw.status, endpoint)


def _assemble_stream(answer: HTTPAnswer, endpoint: str) -> dict[str, Any] | Failure | None:
    """Return the completion whose parts an event stream has, or why there is none.

    Returns:
        None if the body is not an event stream.
    """
    lines = answer.body.removeprefix(_MARK).splitlines()
    first = next((line for line in lines if line.strip()), b"")
    if not first.startswith(_FIELDS):
        return None
    parts = _StreamParts()
    for line in lines:
        if _is_done(line):
            parts.is_done = True
            break
        if not line.startswith(_DATA):
            continue
        try:
            chunk = _decode(line)
            failure = _error_event(chunk, line, answer, endpoint)
        except ValueError:
            problem = "the answer is a stream, and one of its events is not JSON"
            return failures.classify_bad_reply(answer.mask_keys(), problem, endpoint)
        if failure is not None:
            return failure
        if chunk is not None:
            parts.add(chunk)
    if not parts.choices:
        problem = "the answer is a stream without an answer"
        return failures.classify_bad_reply(answer.mask_keys(), problem, endpoint)
    return parts.join() if parts.has_ended else failures.classify_early_end(endpoint)


class _StreamParts:
    """The parts of a completion that was sent as an event stream.

    Attributes:
        choices: The choices by their index.
        is_done: Whether the event came that ends a stream.
    """

    def __init__(self) -> None:
        self._top: dict[str, Any] = {}
        self.choices: dict[int, _ChoiceParts] = {}
        self.is_done = False

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Add one event, normalized."""
        self._top |= {name: value for name, value in chunk.items() if value is not None}
        for choice in chunk.get("choices") or ():
            index = choice.get("index")
            key = index if type(index) is int else 0
            self.choices.setdefault(key, _ChoiceParts()).add(choice)

    @property
    def has_ended(self) -> bool:
        """Return True if no part is missing."""
        return self.is_done or all(one.reason is not None for one in self.choices.values())

    def join(self) -> dict[str, Any]:
        """Return the completion."""
        choices = [{"index": key, **one.join()} for key, one in sorted(self.choices.items())]
        return {**self._top, "object": "chat.completion", "choices": choices}


class _ChoiceParts:
    """The parts of one choice.

    Attributes:
        reason: Its finish reason, once it has come.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._texts = dict[str, list[str]]()
        self._calls = dict[int, _CallParts]()
        self._function: _CallParts | None = None
        self._logprobs = dict[str, list[Any]]()

    def add(self, choice: Mapping[str, Any]) -> None:
        """Add what one event has of the choice: a part of the message, or the whole message."""
        self.reason = choice.get("finish_reason") or self.reason
        for name, values in (choice.get("logprobs") or {}).items():
            if isinstance(values, list):
                self._logprobs.setdefault(name, []).extend(values)
        if isinstance(message := choice.get("message"), dict):
            self._message = message
            return
        delta = choice["delta"]
        for name in ("content", "refusal", "reasoning"):
            if text := delta.get(name):
                self._texts.setdefault(name, []).append(text)
        for call in delta.get("tool_calls") or ():
            self._calls.setdefault(call["index"], _CallParts()).add(call["function"], call["id"])
        if function := delta.get("function_call"):
            self._function = self._function or _CallParts()
            self._function.add(function)

    def join(self) -> dict[str, Any]:
        """Return message, finish reason and log probabilities."""
        message = dict(self._message)
        for name, texts in self._texts.items():
            message[name] = message.get(name) or "".join(texts)
        if self._calls:
            calls = [
                {"id": call.id, "type": "function", "function": call.join()}
                for _, call in sorted(self._calls.items())
            ]
            message["tool_calls"] = message.get("tool_calls") or calls
        if self._function is not None:
            message["function_call"] = message.get("function_call") or self._function.join()
        logprobs = self._logprobs or None
        return {"message": message, "finish_reason": self.reason, "logprobs": logprobs}


class _CallParts:
    """The parts of one call of a tool.

    Attributes:
        id: Its id, or None.
    """

    def __init__(self) -> None:
        self.id: str | None = None
        self._name: str | None = None
        self._arguments: list[str] = []

    def add(self, function: Mapping[str, Any], name: str | None = None) -> None:
        """Add a part of the function's name and arguments, and the id of the call."""
        self.id = self.id or name
        self._name = self._name or function.get("name")
        self._arguments.append(function.get("arguments") or "")

    def join(self) -> dict[str, Any]:
        """Return the name and the arguments of the function."""
        return {"name": self._name, "arguments": "".join(self._arguments)}
