"""Map HTTP errors to an error class and a retry rule."""

from __future__ import annotations

import email.utils
import enum
import errno
import html
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

import orjson

from ..core.connection_errors import describe_connection_error
from ..core.errors import (
    AuthenticationError,
    EndpointBusyError,
    EndpointError,
    EndpointLostError,
    EndpointReplyError,
    ModelNotServedError,
    PromptTooLongError,
    RequestRefusedError,
)
from ..core.images import mask_images
from ..core.lazy_tls import aiohttp
from ..core.secrets import MASKED
from ..core.values import parse_json
from .endpoint import NO_KEY, redact_url

_PREVIEW: Final = 200
"""Limit of characters of a body that a message quotes."""
_KEY_HEADERS: Final = ("Authorization", "Proxy-Authorization")
_SHORTEST_KEY: Final = 4


class HTTPAnswer(Exception):  # noqa: N818 - an answer that travels as a cause, not an error's name
    """The HTTP answer behind an endpoint's error: its ``__cause__``.

    Args:
        status: HTTP status.
        headers: Headers, names in lower case.
        body: The body as it came.
        sent: The headers of the request, whose keys ``mask_keys`` removes.
    """

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
        sent: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, headers, body)
        self._sent = sent
        self.status = status
        self.headers = headers
        self.body = body

    def replace_body(self, status: int, body: bytes) -> HTTPAnswer:
        """Return an answer to the same request, with the same headers."""
        return HTTPAnswer(status, self.headers, body, self._sent)

    def mask_keys(self) -> HTTPAnswer:
        """Return the answer without the request's keys, which some servers quote in errors."""
        keys = find_sent_keys(self._sent)
        if not keys:
            return self
        try:
            body = orjson.dumps(parse_json(self.body))  # undoes escapes that could hide a key
        except (ValueError, RecursionError, orjson.JSONEncodeError):
            body = self.body
        if (masked := _mask(body, keys)) == body:
            masked = _mask(self.body, keys)
        return HTTPAnswer(self.status, self.headers, masked)

    def __str__(self) -> str:
        """Return status and the body's beginning; headers may contain cookies."""
        return f"HTTP {self.status}: {shorten(self.body)}"


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """An error body in one common form.

    Attributes:
        message: The server's message, shortened.
        code: Its error code or type, or None.
        param: The request's field at fault, or None.
        html: Whether the body is a web page: a proxy or a wrong URL answered.
    """

    message: str
    code: str | None = None
    type: str | None = None
    param: str | None = None
    html: bool = False

    @classmethod
    def parse(cls, body: bytes) -> ErrorBody:
        """Parse an error body in any of the five known forms."""
        try:
            document = parse_json(body)
        except (ValueError, RecursionError):
            return cls(shorten(body), html=body.lstrip()[:1] == b"<")
        return cls.from_json(document)

    @classmethod
    def from_json(cls, document: Any) -> ErrorBody:
        """Convert a decoded error body."""
        if isinstance(document, dict) and (inner := document.get("error")):
            if isinstance(inner, dict):
                return cls(
                    shorten(inner.get("message") or inner),
                    _text(inner.get("code")),
                    _text(inner.get("type")),
                    _text(inner.get("param")),
                )
            return cls(shorten(inner))
        if isinstance(document, dict) and "detail" in document:
            return cls(shorten(document["detail"]), _text(document.get("code")))
        if isinstance(document, dict) and document.get("object") == "error":
            # vLLM before 0.9 and the streams of the FIRST gateway put the error at the top.
            return cls(
                shorten(document.get("message") or document),
                _text(document.get("code")),
                _text(document.get("type")),
                _text(document.get("param")),
            )
        return cls(shorten(document))


_WRAPPED: Final = re.compile(r"Upstream endpoint returned \d{3}: b(['\"])(.*)", re.DOTALL)
"""How the FIRST gateway quotes a model server's answer: a Python literal, cut to 256 bytes."""
_ESCAPE: Final = re.compile(r"\\(x[0-9a-f]{2}|.|$)", re.DOTALL)
_ESCAPED: Final = {"n": "\n", "r": "\r", "t": "\t"}
_MEMBER: Final = re.compile(
    r"""[{,]\s*"(message|type|param|code)"\s*:\s*(?:"((?:[^"\\]|\\.)*)|(\d+))""", re.DOTALL
)
_LENGTH_FIELD: Final = re.compile(r"\W?(max_(?:completion_)?tokens)\b")


def unwrap_answer(answer: HTTPAnswer) -> HTTPAnswer:
    """Return the answer of the model server if a gateway quotes it in its own error.

    Members that the quotation cuts off are lost, except that a message about the length of the
    answer names its field at the beginning.
    """
    try:
        error = parse_json(answer.body)["error"]
        found = _WRAPPED.search(error["message"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return answer
    if found is None:
        return answer
    text = found[2].removesuffix(found[1])
    body = _ESCAPE.sub(_unescape, text).encode("latin-1", "replace")
    return answer.replace_body(answer.status, _complete_error(body))


def _unescape(found: re.Match[str]) -> str:
    code = found[1]
    return chr(int(code[1:], 16)) if len(code) > 1 else _ESCAPED.get(code, code)


def _complete_error(body: bytes) -> bytes:
    """Return an error body whose end is cut off as one with the members that are left."""
    try:
        parse_json(body)
    except RecursionError:
        return body
    except ValueError:
        pass
    else:
        return body
    error: dict[str, Any] = {}
    for name, text, number in _MEMBER.findall(body.decode(errors="ignore")):
        error.setdefault(name, int(number) if number else _decode_text(text))
    message = error.get("message")
    if not isinstance(message, str):
        return body
    if "param" not in error and (field := _LENGTH_FIELD.match(message)):
        error["param"] = field[1]
    return orjson.dumps({"error": error})


def _decode_text(text: str) -> Any:
    """Return a JSON text, given without quotes, whose end may be cut off."""
    try:
        return parse_json(f'"{text}"'.encode())
    except ValueError:  # it is cut within an escape
        return text


def find_sent_keys(headers: Mapping[str, str] | None) -> list[str]:
    """Return the keys in a request's headers, except those that are too short to be secret."""
    values = (headers.get(name, "") for name in _KEY_HEADERS) if headers else ()
    keys = (value.partition(" ")[2].strip() or value for value in values)
    return [key for key in keys if len(key) >= _SHORTEST_KEY and key != NO_KEY]


def mask_keys(text: str, headers: Mapping[str, str] | None) -> str:
    """Return a text without the keys in a request's headers."""
    keys = find_sent_keys(headers)
    return _mask(text.encode(errors="replace"), keys).decode() if keys else text


def _mask(body: bytes, keys: Iterable[str]) -> bytes:
    for key in keys:
        forms = (key, orjson.dumps(key).decode()[1:-1], html.escape(key), quote(key, safe=""))
        for form in sorted(dict.fromkeys((*forms, quote(key))), key=len, reverse=True):
            body = body.replace(form.encode(), MASKED.encode())
    return body


def shorten(value: Any) -> str:
    """Return a value's text on one line, shortened for messages."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    line = " ".join(mask_images(text).split())
    return line if len(line) <= _PREVIEW else line[:_PREVIEW] + "…"


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds in a ``Retry-After`` header (RFC 9110, 10.2.3), or None."""
    if milliseconds := headers.get("retry-after-ms"):
        return _seconds(milliseconds, 1000.0)
    value = headers.get("retry-after")
    if value is None:
        return None
    if (seconds := _seconds(value, 1.0)) is not None:
        return seconds
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _seconds(text: str, per_second: float) -> float | None:
    try:
        seconds = float(text) / per_second
    except ValueError:
        return None
    # A header is untrusted text: "nan" and "-1" parse as numbers too.
    return seconds if 0.0 <= seconds < float("inf") else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


class BodyTooLargeError(aiohttp.ClientPayloadError):
    """An answer is larger than the limit."""

    def __init__(self, most: int) -> None:
        super().__init__(f"the answer is larger than {most:,} bytes")
        self.most = most


class ProxyError(aiohttp.ClientConnectionError):
    """A proxy variable of the environment does not name an HTTP proxy."""


class RetryAction(enum.Enum):
    """Action after a failed call."""

    SAME = "repeat, also on the same endpoint"
    OTHER = "repeat on another endpoint"
    WAIT = "let the endpoint rest, then repeat anywhere"
    REKEY = "fetch a new key once, then repeat"
    EJECT = "eject the endpoint, and repeat on another"
    FAIL = "fail the item"
    STOP = "stop the run"


class BreakerEffect(enum.Enum):
    """Effect of a failure on the endpoint's breaker."""

    NO = "the endpoint is healthy"
    COUNT = "several in a row open the breaker"
    OPEN = "opens the breaker at once"


@dataclass(frozen=True, slots=True)
class RetryRule:
    """How one kind of failure is handled.

    Attributes:
        kind: The error class.
        action: What follows.
        breaker_effect: Its effect on the endpoint's breaker.
        shrink: Whether the endpoint's limit of requests in flight is lowered.
        free: Whether the call does not count as one of the item's attempts.
        rest_s: Seconds to rest if the server gives none, or None for the policy's.
        long: Whether that is the policy's long pause.
        window: Whether the tokens of a window are used up: the endpoint rests until its end.
        too_fast: Whether requests came too fast: the rate is lowered.
        shared: Whether the rest applies to the whole fleet (a quota of the user or the model).
        poison: Whether the same failure on several endpoints shows that the item is at fault.
        constant: Whether a field that all requests share was refused, so a setting must change.
        length: Whether the requested length of the answer was refused.
        stale: Whether the server may just have closed an idle connection.
        refusal: Whether an endpoint that answers others refuses the item rather than the key.
        cold: Whether the model behind a gateway may not run.
        tries: Limit of such failures of one item, if waiting longer does not help, or None.
        advice: What to do, for the message.
    """

    kind: type[EndpointError]
    action: RetryAction
    breaker_effect: BreakerEffect = BreakerEffect.NO
    shrink: bool = False
    free: bool = False
    rest_s: float | None = None
    long: bool = False
    window: bool = False
    too_fast: bool = False
    shared: bool = False
    poison: bool = False
    constant: bool = False
    length: bool = False
    stale: bool = False
    refusal: bool = False
    cold: bool = False
    tries: int | None = None
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed call.

    Attributes:
        error: The error to raise if it was the last attempt.
        rule: What follows.
        max_answer_tokens: The longest answer that the same request can ask for, if its length was
            refused.
        accepts_others: Whether the endpoint has recently answered another item with the same key;
            for a refusal for now: since it refused this item before.
        refused_field: The field that all requests share and that was refused, or None.
    """

    error: EndpointError
    rule: RetryRule
    max_answer_tokens: int | None = None
    accepts_others: bool = False
    refused_field: str | None = None

    @property
    def is_refusal(self) -> bool:
        """Return True if the request was refused, possibly because of the item."""
        return self.rule.refusal and self.rule.action is not RetryAction.SAME

    @property
    def has_known_pause(self) -> bool:
        """Return True if the endpoint must rest for a known time; else its limit is lowered."""
        rule = self.rule
        if rule.action is not RetryAction.WAIT:
            return False
        known = self.error.retry_after is not None or rule.rest_s is not None
        return known or rule.long

    @property
    def is_quota(self) -> bool:
        """Return True if a quota is used up that other items use, too: the item is not at fault."""
        return self.rule.window or self.rule.too_fast

    @property
    def is_loss(self) -> bool:
        """Return True if the request was lost with its server, and not for taking too long."""
        rule = self.rule
        lost = rule.kind in {EndpointLostError, EndpointBusyError}
        return lost and rule.breaker_effect is BreakerEffect.COUNT and not rule.shrink

    @property
    def is_clear(self) -> bool:
        """Return True if the refusal needs no further attempt: a web page may be transient."""
        return self.rule.action in {RetryAction.EJECT, RetryAction.REKEY}


_CUT_OFF: Final = frozenset({200, 408, 499, 502, 504, 520, 522, 524})
"""Statuses after which the server may have completed an answer that was lost."""


def may_have_used(failure: Failure) -> bool:
    """Return True if a failed request may have used tokens: its answer may be lost."""
    status = failure.error.status
    return status in _CUT_OFF or (status is None and not failure.rule.free)


_REFUSED: Final = RetryRule(RequestRefusedError, RetryAction.FAIL)
_BUSY: Final = RetryRule(EndpointBusyError, RetryAction.WAIT, free=True)
_SERVER: Final = RetryRule(EndpointError, RetryAction.OTHER, BreakerEffect.COUNT, poison=True)
_STRANGE: Final = RetryRule(EndpointReplyError, RetryAction.OTHER, BreakerEffect.COUNT)
_REFUSED_ODDLY: Final = replace(_STRANGE, refusal=True)
_LOST: Final = RetryRule(EndpointLostError, RetryAction.OTHER, BreakerEffect.COUNT)
_UNCONNECTED: Final = replace(_LOST, breaker_effect=BreakerEffect.OPEN, free=True)
_UNREADABLE: Final = RetryRule(
    EndpointReplyError,
    RetryAction.FAIL,
    advice="check what the server or a proxy adds to its answers",
)
_TOO_LARGE: Final = RetryRule(
    EndpointReplyError,
    RetryAction.OTHER,
    poison=True,
    tries=2,
    advice="limits.body_bytes; raise it if such answers are expected, or lower model.max_tokens",
)

_UNPAID: Final = RetryRule(
    EndpointBusyError,
    RetryAction.EJECT,
    advice="the account cannot pay for the request: correct that, then resume the run",
)
_REDIRECTED: Final = RetryRule(EndpointReplyError, RetryAction.EJECT, refusal=True)
_USED_UP: Final = RetryRule(
    EndpointBusyError,
    RetryAction.EJECT,
    advice="the quota is used up: resume the run when it is renewed",
)
_LONG_QUOTA: Final = re.compile(
    r"\b(?:per|a|each)[ _-]?(?:day|week|month)\b|\b(?:daily|weekly|monthly)\b|\b[rt]pd\b",
    re.IGNORECASE,
)
"""Words for a quota of which waiting a minute renews nothing."""

_REFUSES_FIELDS: Final = frozenset({400, 422, 501})
"""Statuses with which servers refuse a field of the request."""

_TOO_LONG: Final = RetryRule(
    PromptTooLongError, RetryAction.FAIL, advice="shorten the item or use a longer context"
)
_TOO_LONG_WORDS: Final = re.compile(
    r"context[ _](?:length|window|size)|prompt is too long|input token count|`inputs` ",
    re.IGNORECASE,
)
"""Words of SGLang, llama.cpp, Anthropic, Gemini and TGI for a prompt that exceeds the context."""
_ANSWER_LIMIT: Final = re.compile(r"\bmax(?:_completion)?_tokens\b")

_BY_STATUS: Final[Mapping[int, RetryRule]] = {
    400: _REFUSED,
    401: RetryRule(
        AuthenticationError, RetryAction.REKEY, refusal=True, advice="check the endpoint's api_key"
    ),
    402: _UNPAID,
    403: RetryRule(
        AuthenticationError,
        RetryAction.EJECT,
        refusal=True,
        advice="the key is not allowed to use this endpoint",
    ),
    404: RetryRule(
        ModelNotServedError,
        RetryAction.EJECT,
        refusal=True,
        advice="check model.name and the endpoint's URL",
    ),
    405: RetryRule(
        RequestRefusedError, RetryAction.EJECT, refusal=True, advice="check the endpoint's URL"
    ),
    408: RetryRule(EndpointLostError, RetryAction.SAME, shrink=True),
    409: RetryRule(EndpointError, RetryAction.SAME),
    413: replace(_TOO_LONG, advice="shorten the item, or raise the server's limit of a request"),
    429: _BUSY,
    500: _SERVER,
    501: _REFUSED,
    502: _LOST,
    503: RetryRule(EndpointBusyError, RetryAction.OTHER, BreakerEffect.COUNT),
    504: replace(_LOST, shrink=True),
}

_BY_CLASS: Final[Mapping[int, RetryRule]] = {3: _REDIRECTED, 4: _REFUSED_ODDLY, 5: _SERVER}
"""Rules by the first digit of a status that is not in the table above."""

_WRONG_PATH: Final = RetryRule(
    RequestRefusedError, RetryAction.EJECT, refusal=True, advice="check endpoints.first.paths"
)

_BY_CODE: Final[Mapping[str, RetryRule]] = {
    "quota_exceeded": replace(_BUSY, long=True, shared=True),
    "batch_ongoing": replace(_BUSY, long=True, shared=True),
    "too_many_requests": replace(_BUSY, window=True),
    "request_timeout": RetryRule(
        EndpointLostError, RetryAction.OTHER, shrink=True, cold=True, tries=2
    ),
    "insufficient_quota": RetryRule(
        EndpointBusyError, RetryAction.STOP, advice="the account's quota is used up"
    ),
    "unsupported_framework": _WRONG_PATH,
    "unsupported_endpoint": _WRONG_PATH,
    "cluster_under_maintenance": replace(_BUSY, long=True, breaker_effect=BreakerEffect.OPEN),
}

_BUSY_WORDS: Final = ("currently busy", "backlog limit")
_THROTTLE_WORDS: Final = "Too many requests"
_COLD_WORDS: Final = ("not ready to receive tasks",)
_OFFLINE_WORDS: Final = ("is offline", "not currently live")
_LOGIN_AGAIN: Final = RetryRule(
    AuthenticationError,
    RetryAction.STOP,
    advice=(
        "a new token does not help: log in again (alcf-tokens clear-tokens, then alcf-tokens "
        "login), then resume the run"
    ),
)
_BY_WORDS: Final = (
    (401, b"internal policies", _LOGIN_AGAIN),
    (500, b"All connection attempts failed", _UNCONNECTED),
)
"""Rules by status and words of the body, where the FIRST gateway has no code for a failure."""
_UNSERVED: Final = frozenset({404, 405})
"""Statuses of a URL that a server does not have."""
_UNSERVED_CODE: Final = "unsupported_endpoint"
"""Code of a URL that a deployment behind the FIRST gateway does not offer; its status is 400."""
_MODEL_CODES: Final = frozenset(
    {"NotFoundError", "model_not_found", "endpoint_not_found", "cluster_not_found"}
)
"""Codes with which a server does not know the model, rather than the URL."""
_LENGTH_PARAMS: Final = frozenset({"input_tokens", "input_text"})
_NO_DESCRIPTOR: Final = frozenset({errno.EMFILE, errno.ENFILE})
_NO_DESCRIPTOR_RULE: Final = RetryRule(
    EndpointLostError, RetryAction.STOP, advice="lower limits.streams, or raise ulimit -n"
)


def classify_answer(answer: HTTPAnswer, endpoint: str) -> Failure:
    """Classify an answer with an error status.

    Args:
        answer: The HTTP answer.
        endpoint: The endpoint's label.
    """
    answer = unwrap_answer(answer)
    return classify_error_body(answer, ErrorBody.parse(answer.body), answer.status, endpoint)


def classify_unserved(failure: Failure, url: str) -> Failure:
    """Let a request fail whose URL its endpoint does not serve: it is there for other requests.

    Args:
        failure: The failure of a request that does not ask for a chat completion.
        url: Its URL, without that of the endpoint.
    """
    error = failure.error
    is_unserved = error.status in _UNSERVED and error.code not in _MODEL_CODES
    if not is_unserved and error.code != _UNSERVED_CODE:
        return failure
    advice = f" ({failure.rule.advice})"
    rule = replace(_REFUSED, advice=f"does this endpoint serve {url}?")
    refused = RequestRefusedError(
        f"{error.message.removesuffix(advice)} ({rule.advice})",
        error.endpoint,
        error.status,
        error.code,
    )
    refused.__cause__ = error.__cause__
    return Failure(refused, rule)


def classify_error_body(
    answer: HTTPAnswer, error_body: ErrorBody, status: int, endpoint: str
) -> Failure:
    """Classify an error body; ``status`` may come from the body rather than from the answer."""
    rule, wait = _choose_rule(status, error_body, answer.body), read_retry_after(answer.headers)
    if status == 429 and wait is None and _LONG_QUOTA.search(error_body.message):  # noqa: PLR2004
        rule = _USED_UP
    advice = rule.advice
    if error_body.html:
        advice = "the answer is a web page: check the URL and any proxy"
    if location := answer.headers.get("location") if rule is _REDIRECTED else None:
        advice = (
            f"it redirects to {_shorten_location(location)}, and redirects are not followed: "
            "correct the endpoint's URL"
        )
    if wait is not None and rule.kind is EndpointBusyError and rule.action is RetryAction.OTHER:
        rule = replace(rule, action=RetryAction.WAIT)
    said = f": {error_body.message}" if error_body.message else ""
    message = f"{endpoint}: HTTP {answer.status}{said}"
    error = rule.kind(
        f"{message} ({advice})" if advice else message,
        endpoint,
        status,
        error_body.code or error_body.type,
        wait,
    )
    error.__cause__ = answer
    return Failure(error, rule)


def _choose_rule(status: int, error_body: ErrorBody, body: bytes) -> RetryRule:
    if by_code := _BY_CODE.get(error_body.code or ""):
        return by_code
    if status in {400, 422}:
        return _choose_refusal_rule(error_body)
    if status == 503:  # noqa: PLR2004 - HTTP's own number
        return _choose_503_rule(error_body)
    for known, words, rule in _BY_WORDS:
        if status == known and words in body:  # the message of the error body is shortened
            return rule
    if status == 429 and error_body.message.startswith(_THROTTLE_WORDS):  # noqa: PLR2004 - HTTP's own
        # The gateway counts requests per user: it would refuse its other endpoints too.
        return replace(_BUSY, rest_s=1.0, shared=True, too_fast=True)
    return _BY_STATUS.get(status) or _BY_CLASS.get(status // 100, _STRANGE)


def _shorten_location(location: str) -> str:
    """Return where a redirect leads, without credentials and query."""
    try:
        return shorten(redact_url(location))
    except ValueError:
        return "a malformed URL"


def _choose_refusal_rule(error_body: ErrorBody) -> RetryRule:
    text = error_body.message
    if error_body.param in _LENGTH_PARAMS or "maximum context length" in text:
        return _TOO_LONG
    if error_body.param in {"max_tokens", "max_completion_tokens"}:
        return replace(_REFUSED, length=True, advice="lower model.max_tokens")
    return _TOO_LONG if _says_too_long(text) else _REFUSED


def _says_too_long(message: str) -> bool:
    """Return True if a server says that a prompt exceeds its context, and not ``max_tokens``."""
    return _TOO_LONG_WORDS.search(message) is not None and _ANSWER_LIMIT.search(message) is None


_NEW_RUN: Final = "; it may change answers, so start a new run with it, in a new run folder"
_RESUME: Final = (
    "; it changes no answer, so the run can be resumed with it: fanfold resume DIR --set"
)
_SCHEMA_ADVICE: Final = (
    f"simplify task.schema to what this server supports, or leave it out{_NEW_RUN}"
)
_ADVICE: Final[Mapping[str, str]] = {
    "temperature": (
        f"set model.temperature: null, which sends none, or a value that it accepts{_NEW_RUN}"
    ),
    "max_completion_tokens": (
        f"set model.max_tokens_field: max_tokens{_RESUME} model.max_tokens_field=max_tokens"
    ),
    "max_tokens": (
        f"set model.max_tokens_field: max_completion_tokens{_RESUME} "
        "model.max_tokens_field=max_completion_tokens"
    ),
    "seed": f"set model.seed: null{_NEW_RUN}",
    "response_format": _SCHEMA_ADVICE,
}
"""What to set if a server refuses a field of the request, and how a run goes on with it."""
LOGPROBS_FIELD: Final = "logprobs"
"""Field of a request for the log probabilities of the answer's tokens."""
_LOGPROBS: Final = re.compile(r"\blog[ _-]?prob")
_ROLE_ADVICE: Final = f"set model.system_role: user or developer{_NEW_RUN}"
_VARIABLE_FIELDS: Final = frozenset({"messages", "model", "stream"})
_LENGTH_FIELDS: Final = frozenset({"max_tokens", "max_completion_tokens"})
_ECHOES: Final = frozenset({"input", "ctx", "url", "body", "messages", "prompt", "request"})
"""Keys of an error body below which it may repeat the request."""
_ECHO: Final = re.compile(r"""['"](?:input|body|messages|prompt|request)['"]\s*:.*""", re.DOTALL)
_UNSUPPORTED: Final = (
    r"not support|unsupported|un(?:recognized|recognised|known|expected)|extra[_ ]|forbidden|"
    r"not (?:be )?(?:allowed|permitted|accepted|available|implemented|used|set)|deprecated"
)
_DENIAL_PATTERN: Final = (
    rf"{_UNSUPPORTED}|\binvalid\b|not valid|must be|must alternate|cannot|no longer|"
    r"only .*(?:default|supported|allowed)"
)
_DENIAL: Final = re.compile(_DENIAL_PATTERN)
_LENGTH_DENIAL: Final = re.compile(
    rf"{_UNSUPPORTED}|use ['\"`]?max_(?:completion_)?tokens['\"`]? instead"
)
"""Words that refuse a field itself: which of its values are accepted may depend on the item."""
_TEMPERATURE: Final = re.compile(
    rf"\btemperature\b[^.;:\n]{{0,60}}(?:{_DENIAL_PATTERN})|"
    rf"(?:{_DENIAL_PATTERN})[^.;:\n]{{0,40}}\btemperature\b"
)
_FIELD_WORDS: Final = r"(?:parameter|field|argument|option)"
_SCHEMA: Final = re.compile(
    r"response[ _-]?format|json[ _-]?schema|structured[ _-]?outputs?|guided[ _-](?:json|decoding)|"
    r"\bgrammar"
)
_SCHEMA_ITSELF: Final = re.compile(r"\bschema\b|\bkeyword\b")
_NO_KEYWORDS: Final = frozenset({"properties", "patternproperties", "$defs", "definitions"})
_ROLE: Final = re.compile(
    r"\b(?:system|developer)['\"`]? (?:role|message)|\brole\b.*\b(?:system|developer)\b|"
    r"roles? must alternate"
)
_NUMBER: Final = re.compile(r"(?<![\w.-])\d{1,9}(?![\w.-]*\d)")
"""A whole number that is not part of a name, a version or a date."""


def find_lower_number(text: str, most: int) -> int | None:
    """Return the largest whole number in a text that is lower than ``most``, or None."""
    return max((n for n in map(int, _NUMBER.findall(text)) if 0 < n < most), default=None)


def classify_refused_field(failure: Failure, body: Mapping[str, Any]) -> Failure:
    """Classify a refusal of a field that all requests share: no item can succeed with it.

    Args:
        failure: A failed call.
        body: Its request.

    Returns:
        The failure, with the setting to change if it is such a refusal.
    """
    answer = failure.error.__cause__
    if failure.error.status not in _REFUSES_FIELDS or not isinstance(answer, HTTPAnswer):
        return failure
    if failure.rule.kind is not RequestRefusedError:
        return failure
    found = _find_refused_field(_list_statements(answer.body), body)
    if found is None:
        return failure
    (field, advice), error = found, failure.error
    message = error.message.removesuffix(f" ({failure.rule.advice})") + f" ({advice})"
    refused = RequestRefusedError(message, error.endpoint, error.status, error.code)
    refused.__cause__ = answer
    rule = replace(_REFUSED, constant=True, advice=advice)
    return Failure(refused, rule, refused_field=field)


def _find_refused_field(
    statements: Iterable[str], body: Mapping[str, Any]
) -> tuple[str, str] | None:
    """Return the field that one of the statements refuses, and what to set.

    A refusal of the answer's format counts under any of its names, which differ between servers.
    """
    fields = [field for field in body if field not in _VARIABLE_FIELDS]
    has_role = body["messages"][0].get("role") in ("system", "developer")
    keywords = set(_list_keywords(body.get("response_format")))
    for statement in statements:
        if has_role and _ROLE.search(statement) and _DENIAL.search(statement):
            return "messages", _ROLE_ADVICE
        for field in fields:
            if _refuses_field(statement, field.lower(), body[field]):
                other = f"remove {field} from model.extra_body{_NEW_RUN}"
                return field, _ADVICE.get(field, other)
        if _SCHEMA.search(statement) or _refuses_schema(statement, keywords):
            return "response_format", _SCHEMA_ADVICE
    return None


def _refuses_field(statement: str, field: str, value: Any) -> bool:
    """Return True if a statement refuses a field; an ordinary word alone does not name a field."""
    if field == LOGPROBS_FIELD:
        return _LOGPROBS.search(statement) is not None
    if field in _LENGTH_FIELDS:
        has_limit = isinstance(value, int) and find_lower_number(statement, value) is not None
        denied = _LENGTH_DENIAL.search(statement) and not has_limit
    else:
        denied = _DENIAL.search(statement) is not None
    name = re.escape(field)
    if "_" in field:
        return bool(denied and re.search(rf"(?<!\w){name}(?!\w)", statement))
    if field == "temperature" and _TEMPERATURE.search(statement):
        return True
    worded = re.search(rf"{_FIELD_WORDS}s?:? {name}\b|\b{name} {_FIELD_WORDS}", statement)
    return bool(denied and (worded or _names_quoted(statement, field)))


def _refuses_schema(statement: str, keywords: Collection[str]) -> bool:
    itself = keywords and _SCHEMA_ITSELF.search(statement)
    named = itself or any(_names_quoted(statement, keyword) for keyword in keywords)
    return bool(named and _DENIAL.search(statement))


def _names_quoted(statement: str, name: str) -> bool:
    return any(f"{quote}{name}{quote}" in statement for quote in ("'", '"', "`"))


def _list_keywords(answer_format: Any) -> Iterator[str]:
    """Yield the keywords of a request's schema in lower case, except the ordinary ``type``."""
    wanted = answer_format.get("json_schema") if isinstance(answer_format, dict) else None
    todo = [wanted.get("schema")] if isinstance(wanted, dict) else []
    while todo:
        one = todo.pop()
        if isinstance(one, list):
            todo += one
        elif isinstance(one, dict):
            for key, inner in one.items():
                named = key.lower() in _NO_KEYWORDS and isinstance(inner, dict)
                todo += inner.values() if named else [inner]
                if key != "type":
                    yield key.lower()


def _list_statements(body: bytes) -> Iterator[str]:
    """Yield the statements of an error body in lower case, without what repeats the request.

    Each object of the body is one statement: its texts in quotes, with their keys.
    """
    try:
        document = parse_json(body)
    except (ValueError, RecursionError):
        yield _ECHO.sub("", body.decode(errors="replace")).lower()
        return
    todo: list[Any] = [document]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            values = {key: value for key, value in one.items() if key.lower() not in _ECHOES}
            texts = [text for key, value in values.items() for text in _list_texts(key, value)]
            yield " ".join(_ECHO.sub("", text) for text in texts).lower()
            todo += values.values()
        elif isinstance(one, list):
            todo += one
        elif isinstance(one, str) and one is document:
            yield _ECHO.sub("", one).lower()


def _list_texts(key: str, value: Any) -> list[str]:
    """Return the texts of a member of an error body; names are quoted."""
    parts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    texts = [part for part in parts if isinstance(part, str) and not part.isdigit()]
    if key.lower() in ("param", "loc") and texts:
        return [*(f"'{text}'" for text in texts), f"invalid parameter '{texts[-1]}'"]
    return [text if " " in text else f"'{text}'" for text in texts]


def _choose_503_rule(error_body: ErrorBody) -> RetryRule:
    text = error_body.message
    if error_body.type == "Service Unavailable" or any(word in text for word in _BUSY_WORDS):
        return _BUSY
    if any(word in text for word in _COLD_WORDS):
        return replace(_BUSY, long=True, cold=True)
    if any(word in text for word in _OFFLINE_WORDS):
        return replace(_BUSY, long=True, breaker_effect=BreakerEffect.OPEN)
    return _BY_STATUS[503]


def classify_bad_reply(answer: HTTPAnswer, problem: str, endpoint: str) -> Failure:
    """Classify an answer with status 200 that is not a chat completion."""
    error = EndpointReplyError(f"{endpoint}: {problem}: {answer}", endpoint, answer.status)
    error.__cause__ = answer
    page = answer.body.lstrip()[:1] == b"<"
    return Failure(error, _REFUSED_ODDLY if page else _STRANGE)


def classify_too_deep(answer: HTTPAnswer, endpoint: str) -> Failure:
    """Classify an answer that is nested too deep to parse: other endpoints would not help."""
    error = EndpointReplyError(
        f"{endpoint}: the answer has more levels of lists and objects than can be parsed: "
        f"{answer} ({_UNREADABLE.advice})",
        endpoint,
        answer.status,
    )
    return Failure(error, _UNREADABLE)


def make_refused_item_error(failure: Failure, endpoints: int) -> EndpointError:
    """Return the error of an item that is refused by endpoints that answer other items."""
    error, where = failure.error, f"{endpoints} endpoints" if endpoints > 1 else "the endpoint"
    refused = RequestRefusedError(
        f"{error.message}; {where} refused this item and answered others with the same key",
        error.endpoint,
        error.status,
        error.code,
    )
    refused.__cause__ = error.__cause__
    return refused


def classify_abort(answer: HTTPAnswer, endpoint: str) -> Failure:
    """Classify an answer that the server aborted: complete in form, partial in content."""
    error = EndpointLostError(f"{endpoint}: the server aborted the answer", endpoint, answer.status)
    error.__cause__ = answer
    return Failure(error, _LOST)


def classify_early_end(endpoint: str) -> Failure:
    """Classify a stream that ended early."""
    message = f"{endpoint}: the stream ended before the answer was complete"
    return Failure(EndpointLostError(message, endpoint), _LOST)


def classify_bad_event(endpoint: str) -> Failure:
    """Classify a stream with an event that cannot be parsed: a part of the answer is missing."""
    message = f"{endpoint}: an event of the stream is not JSON: a part of the answer is missing"
    error = EndpointLostError(message, endpoint)
    error.has_partial_answer = True  # so the whole answer is requested again
    return Failure(error, replace(_LOST, action=RetryAction.FAIL))


def classify_stopped(endpoint: str, *, refuses: bool) -> Failure:
    """Classify a request whose server stopped, and kept the connection open.

    Args:
        endpoint: The endpoint's label.
        refuses: Whether it refuses new connections; else another server answers them, which has no
            request to process.
    """
    found = "it refuses new connections" if refuses else "its server now has no request to process"
    message = f"{endpoint}: the request was lost when the server stopped: {found}"
    effect = BreakerEffect.OPEN if refuses else BreakerEffect.NO
    rule = replace(_LOST, breaker_effect=effect, stale=True)
    return Failure(EndpointLostError(message, endpoint), rule)


def classify_mixture(endpoint: str, simulated: bool) -> Failure:
    """Classify an answer that mixes simulated and real endpoints; it stops the run."""
    kind, other = ("a simulated", "real") if simulated else ("a real", "simulated")
    error = EndpointReplyError(
        f"{endpoint} gave {kind} answer in a run with {other} answers; they must not be mixed: "
        "correct endpoints, or start another run",
        endpoint,
    )
    return Failure(error, RetryRule(EndpointReplyError, RetryAction.STOP))


def classify_exception(
    cause: aiohttp.ClientError | TimeoutError,
    endpoint: str,
    sent: Mapping[str, str] | None = None,
) -> Failure:
    """Classify a failed connection or a missing answer.

    Args:
        cause: The exception; it may quote a broken answer.
        endpoint: The endpoint's label.
        sent: The headers of the request, whose keys the message must not show.
    """
    if isinstance(cause, BodyTooLargeError):
        return _classify_too_large(cause, endpoint)
    problem, rule = _classify_connection(cause)
    hint = f" ({rule.advice})" if rule.advice else ""
    shown = mask_keys(problem, sent)
    error = EndpointLostError(f"{endpoint}: {shown}{hint}", endpoint)
    if shown == problem:
        error.__cause__ = cause  # else its text contains the key
    return Failure(error, rule)


def _classify_too_large(cause: BodyTooLargeError, endpoint: str) -> Failure:
    error = EndpointReplyError(f"{endpoint}: {cause} ({_TOO_LARGE.advice})", endpoint)
    error.__cause__ = cause
    return Failure(error, _TOO_LARGE)


def _classify_connection(cause: aiohttp.ClientError | TimeoutError) -> tuple[str, RetryRule]:
    if isinstance(cause, aiohttp.ConnectionTimeoutError):
        return "no connection in time", _UNCONNECTED
    if isinstance(cause, TimeoutError):
        return "no answer in time", replace(_LOST, shrink=True)
    if isinstance(cause, OSError) and cause.errno in _NO_DESCRIPTOR:
        return "this process has too many open files", _NO_DESCRIPTOR_RULE
    if isinstance(cause, aiohttp.ClientConnectorError | ProxyError):
        return f"cannot connect: {describe_connection_error(cause)}", _UNCONNECTED
    if isinstance(cause, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
        return "the connection was closed before an answer", replace(_LOST, stale=True)
    reason = describe_connection_error(cause)
    return f"the answer was incomplete or malformed: {reason}", _LOST
