"""HTTP errors -> error class and retry rule."""

from __future__ import annotations

import email.utils
import enum
import errno
import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import orjson

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
from ..core.secrets import MASKED
from ..core.values import parse_json
from .endpoint import NO_KEY

_PREVIEW: Final = 200
"""Characters of a body that a message may quote."""
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

    def mask_keys(self) -> HTTPAnswer:
        """Return the answer without the keys of the request, which some servers quote in errors."""
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
        """Return status and the body's beginning; headers may hold cookies."""
        return f"HTTP {self.status}: {shorten(self.body)}"


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """An error body in one shape.

    Attributes:
        message: The server's words, shortened.
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
        """Read an error body in any of the five shapes."""
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            return cls(shorten(body), html=body.lstrip()[:1] == b"<")
        return cls.from_json(document)

    @classmethod
    def from_json(cls, document: Any) -> ErrorBody:
        """Read a decoded error body."""
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


def find_sent_keys(headers: Mapping[str, str] | None) -> list[str]:
    """Return the keys that the headers of a request hold, none that is too short to be secret."""
    values = (headers.get(name, "") for name in _KEY_HEADERS) if headers else ()
    keys = (value.partition(" ")[2].strip() or value for value in values)
    return [key for key in keys if len(key) >= _SHORTEST_KEY and key != NO_KEY]


def mask_keys(text: str, headers: Mapping[str, str] | None) -> str:
    """Return a text without the keys that the headers of a request hold."""
    keys = find_sent_keys(headers)
    return _mask(text.encode(errors="replace"), keys).decode() if keys else text


def _mask(body: bytes, keys: Iterable[str]) -> bytes:
    for key in keys:
        forms = (key, orjson.dumps(key).decode()[1:-1], html.escape(key), quote(key, safe=""))
        for form in sorted(dict.fromkeys((*forms, quote(key))), key=len, reverse=True):
            body = body.replace(form.encode(), MASKED.encode())
    return body


def shorten(value: Any) -> str:
    """Return a value's text on one line, cut to a length fit for messages."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    line = " ".join(text.split())
    return line if len(line) <= _PREVIEW else line[:_PREVIEW] + "…"


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for (RFC 9110, 10.2.3), or None."""
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
    # A header is foreign text: "nan" and "-1" parse as numbers too.
    return seconds if 0.0 <= seconds < float("inf") else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


class BodyTooLargeError(aiohttp.ClientPayloadError):
    """An answer has more bytes than may be read of it."""

    def __init__(self, most: int) -> None:
        super().__init__(f"the answer is larger than {most:,} bytes")
        self.most = most


class ProxyError(aiohttp.ClientConnectionError):
    """A proxy variable of the environment does not name an HTTP proxy."""


class RetryAction(enum.Enum):
    """What follows a failed call."""

    SAME = "repeat, also on the same endpoint"
    OTHER = "repeat on another endpoint"
    WAIT = "let the endpoint rest, then repeat anywhere"
    REKEY = "fetch a new key once, then repeat"
    EJECT = "use the endpoint no more, and repeat on another"
    FAIL = "fail the item"
    STOP = "stop the run"


class BreakerEffect(enum.Enum):
    """What a failure means for the endpoint's breaker."""

    NO = "the endpoint is healthy"
    COUNT = "several in a row open the breaker"
    OPEN = "opens the breaker at once"


@dataclass(frozen=True, slots=True)
class RetryRule:
    """How one kind of failure is met.

    Attributes:
        kind: The contract's error class.
        action: What follows.
        breaker_effect: What it means for the endpoint's breaker.
        shrink: Whether the endpoint is sent fewer requests at once.
        free: Whether the call does not count as one of the item's attempts.
        rest_s: Seconds to rest when the server names none, or None for the policy's.
        long: Whether that is the policy's long pause.
        shared: Whether the rest holds for the whole fleet (a quota of the user or the model).
        poison: Whether the same on several endpoints shows that the item is at fault.
        schema: Whether the answer's schema was refused.
        length: Whether the answer's longest length was refused.
        stale: Whether the server may just have closed a connection that idled.
        refusal: Whether an endpoint that answers others refuses the item rather than the key.
        tries: Most such failures of one item, where waiting longer does not help, or None.
        advice: What to do, for the message.
    """

    kind: type[EndpointError]
    action: RetryAction
    breaker_effect: BreakerEffect = BreakerEffect.NO
    shrink: bool = False
    free: bool = False
    rest_s: float | None = None
    long: bool = False
    shared: bool = False
    poison: bool = False
    schema: bool = False
    length: bool = False
    stale: bool = False
    refusal: bool = False
    tries: int | None = None
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed call.

    Attributes:
        error: What to raise if it was the last.
        rule: What follows.
        max_answer_tokens: The longest answer that the same request can ask for, if that was at
            fault.
        accepts_others: Whether the endpoint has lately answered another item with the same key; of
            a refusal for now: since it refused this item before.
    """

    error: EndpointError
    rule: RetryRule
    max_answer_tokens: int | None = None
    accepts_others: bool = False

    @property
    def is_refusal(self) -> bool:
        """Whether the request was refused, for a reason that may lie in the item."""
        return self.rule.refusal and self.rule.action is not RetryAction.SAME

    @property
    def has_known_pause(self) -> bool:
        """Whether the endpoint is to rest for a known time, rather than to get less at once."""
        treatment = self.rule
        if treatment.action is not RetryAction.WAIT:
            return False
        known = self.error.retry_after is not None or treatment.rest_s is not None
        return known or treatment.long

    @property
    def is_clear(self) -> bool:
        """Whether such a refusal needs no further attempt: an odd page may be a moment's matter."""
        return self.rule.action in {RetryAction.EJECT, RetryAction.REKEY}


_REFUSED: Final = RetryRule(RequestRefusedError, RetryAction.FAIL)
_BUSY: Final = RetryRule(EndpointBusyError, RetryAction.WAIT, free=True)
_SERVER: Final = RetryRule(EndpointError, RetryAction.OTHER, BreakerEffect.COUNT, poison=True)
_STRANGE: Final = RetryRule(EndpointReplyError, RetryAction.OTHER, BreakerEffect.COUNT)
_REFUSED_ODDLY: Final = replace(_STRANGE, refusal=True)
_LOST: Final = RetryRule(EndpointLostError, RetryAction.OTHER, BreakerEffect.COUNT)
_UNREADABLE: Final = RetryRule(
    EndpointReplyError,
    RetryAction.FAIL,
    advice="look at what the server or a proxy adds to its answers",
)
_TOO_LARGE: Final = RetryRule(
    EndpointReplyError,
    RetryAction.OTHER,
    poison=True,
    tries=2,
    advice="limits.body_bytes; raise it if such answers are expected, or lower model.max_tokens",
)

_BY_STATUS: Final[Mapping[int, RetryRule]] = {
    400: _REFUSED,
    401: RetryRule(
        AuthenticationError, RetryAction.REKEY, refusal=True, advice="check the endpoint's api_key"
    ),
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
    413: replace(_REFUSED, advice="shorten the item"),
    422: _REFUSED,
    429: _BUSY,
    500: _SERVER,
    501: _REFUSED,
    502: _LOST,
    503: RetryRule(EndpointBusyError, RetryAction.OTHER, BreakerEffect.COUNT),
    504: replace(_LOST, shrink=True),
}

_BY_CLASS: Final[Mapping[int, RetryRule]] = {4: _REFUSED_ODDLY, 5: _SERVER}
"""By the first digit of a status that the table above does not have."""

_WRONG_PATH: Final = RetryRule(
    RequestRefusedError, RetryAction.EJECT, refusal=True, advice="check endpoints.first.paths"
)

_BY_CODE: Final[Mapping[str, RetryRule]] = {
    "quota_exceeded": replace(_BUSY, long=True, shared=True),
    "batch_ongoing": replace(_BUSY, long=True, shared=True),
    "too_many_requests": replace(_BUSY, long=True, shared=True),
    "request_timeout": RetryRule(EndpointLostError, RetryAction.OTHER, shrink=True, tries=2),
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
_OFFLINE_WORDS: Final = ("is offline",)
_LENGTH_PARAMS: Final = frozenset({"input_tokens", "input_text"})
_NO_DESCRIPTOR: Final = frozenset({errno.EMFILE, errno.ENFILE})
_NO_DESCRIPTOR_RULE: Final = RetryRule(
    EndpointLostError, RetryAction.STOP, advice="lower limits.streams, or raise ulimit -n"
)
_SCHEMA_WORDS: Final = ("response_format", "json_schema", "structured_outputs", "grammar")


def classify_answer(answer: HTTPAnswer, endpoint: str) -> Failure:
    """Classify an answer with an error status.

    Args:
        answer: The HTTP answer.
        endpoint: The endpoint's label.
    """
    return classify_error_body(answer, ErrorBody.parse(answer.body), answer.status, endpoint)


def classify_error_body(
    answer: HTTPAnswer, complaint: ErrorBody, status: int, endpoint: str
) -> Failure:
    """Classify an error body; ``status`` may stand in the body rather than in the answer."""
    treatment = _choose_rule(status, complaint)
    advice = treatment.advice
    if complaint.html:
        advice = "a web page came instead of an answer: check the URL and any proxy in between"
    wait = read_retry_after(answer.headers)
    if (
        wait is not None
        and treatment.kind is EndpointBusyError
        and treatment.action is RetryAction.OTHER
    ):
        treatment = replace(treatment, action=RetryAction.WAIT)
    message = f"{endpoint}: HTTP {answer.status}: {complaint.message}"
    error = treatment.kind(
        f"{message} ({advice})" if advice else message,
        endpoint,
        status,
        complaint.code or complaint.type,
        wait,
    )
    error.__cause__ = answer
    return Failure(error, treatment)


def _choose_rule(status: int, complaint: ErrorBody) -> RetryRule:
    if treatment := _BY_CODE.get(complaint.code or ""):
        return treatment
    if status == 400:  # noqa: PLR2004 - HTTP's own number
        return _choose_400_rule(complaint)
    if status == 503:  # noqa: PLR2004 - HTTP's own number
        return _choose_503_rule(complaint)
    if status == 429 and complaint.message.startswith(_THROTTLE_WORDS):  # noqa: PLR2004 - HTTP's own
        # The gateway counts requests per user: the others of its host would be refused too.
        return replace(_BUSY, rest_s=1.0, shared=True)
    return _BY_STATUS.get(status) or _BY_CLASS.get(status // 100, _STRANGE)


def _choose_400_rule(complaint: ErrorBody) -> RetryRule:
    text = complaint.message
    if complaint.param in _LENGTH_PARAMS or "maximum context length" in text:
        return RetryRule(
            PromptTooLongError, RetryAction.FAIL, advice="shorten the item or use a longer context"
        )
    if complaint.param in {"max_tokens", "max_completion_tokens"}:
        return replace(_REFUSED, length=True, advice="lower model.max_tokens")
    if complaint.param == "response_format" or any(word in text for word in _SCHEMA_WORDS):
        return replace(
            _REFUSED, schema=True, advice="simplify task.schema to what this server supports"
        )
    return _REFUSED


def _choose_503_rule(complaint: ErrorBody) -> RetryRule:
    text = complaint.message
    if complaint.type == "Service Unavailable" or any(word in text for word in _BUSY_WORDS):
        return _BUSY
    if any(word in text for word in _COLD_WORDS):
        return replace(_BUSY, long=True)
    if any(word in text for word in _OFFLINE_WORDS):
        return replace(_BUSY, long=True, breaker_effect=BreakerEffect.OPEN)
    return _BY_STATUS[503]


def classify_bad_reply(answer: HTTPAnswer, problem: str, endpoint: str) -> Failure:
    """Classify an answer with status 200 that is no chat completion."""
    error = EndpointReplyError(f"{endpoint}: {problem}: {answer}", endpoint, answer.status)
    error.__cause__ = answer
    page = answer.body.lstrip()[:1] == b"<"
    return Failure(error, _REFUSED_ODDLY if page else _STRANGE)


def classify_too_deep(answer: HTTPAnswer, endpoint: str) -> Failure:
    """Classify an answer that is nested too deep to be read: it would be so elsewhere, too."""
    error = EndpointReplyError(
        f"{endpoint}: the answer has more levels of lists and objects than can be read: "
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
    """Classify an answer that the server gave up: whole in form, partial in content."""
    error = EndpointLostError(
        f"{endpoint}: the server gave up before the answer was whole", endpoint, answer.status
    )
    error.__cause__ = answer
    return Failure(error, _LOST)


def classify_early_end(endpoint: str) -> Failure:
    """Classify a stream that ended without an end."""
    message = f"{endpoint}: the stream ended before the answer was whole"
    return Failure(EndpointLostError(message, endpoint), _LOST)


def classify_bad_event(endpoint: str) -> Failure:
    """Classify a stream with an event that cannot be read: a part of the answer is missing."""
    message = f"{endpoint}: an event of the stream is no JSON: a part of the answer is missing"
    error = EndpointLostError(message, endpoint)
    error.has_partial_answer = True  # so it is asked for again as a whole
    return Failure(error, replace(_LOST, action=RetryAction.FAIL))


def classify_mixture(endpoint: str, simulated: bool) -> Failure:
    """Stop a run whose endpoints are partly simulated."""
    kind, other = ("a simulated", "real") if simulated else ("a real", "simulated")
    error = EndpointReplyError(
        f"{endpoint} gave {kind} answer in a run of {other} ones; they never mix: correct "
        "endpoints, or start another run",
        endpoint,
    )
    return Failure(error, RetryRule(EndpointReplyError, RetryAction.STOP))


def classify_exception(
    cause: aiohttp.ClientError | TimeoutError,
    endpoint: str,
    sent: Mapping[str, str] | None = None,
) -> Failure:
    """Classify a connection that failed or an answer that did not come.

    Args:
        cause: What happened; it may quote a broken answer.
        endpoint: The endpoint's label.
        sent: The headers of the request, whose keys the message must not show.
    """
    if isinstance(cause, BodyTooLargeError):
        return _classify_too_large(cause, endpoint)
    problem, treatment = _classify_connection(cause)
    hint = f" ({treatment.advice})" if treatment.advice else ""
    shown = mask_keys(problem, sent)
    error = EndpointLostError(f"{endpoint}: {shown}{hint}", endpoint)
    if shown == problem:
        error.__cause__ = cause  # else its text holds the key
    return Failure(error, treatment)


def _classify_too_large(cause: BodyTooLargeError, endpoint: str) -> Failure:
    error = EndpointReplyError(f"{endpoint}: {cause} ({_TOO_LARGE.advice})", endpoint)
    error.__cause__ = cause
    return Failure(error, _TOO_LARGE)


def _classify_connection(cause: aiohttp.ClientError | TimeoutError) -> tuple[str, RetryRule]:
    if isinstance(cause, aiohttp.ConnectionTimeoutError):
        return "no connection in time", replace(_LOST, breaker_effect=BreakerEffect.OPEN, free=True)
    if isinstance(cause, TimeoutError):
        return "no answer in time", replace(_LOST, shrink=True)
    if isinstance(cause, OSError) and cause.errno in _NO_DESCRIPTOR:
        return "this process has too many files open", _NO_DESCRIPTOR_RULE
    if isinstance(cause, aiohttp.ClientConnectorError | ProxyError):
        return f"cannot connect: {cause}", replace(
            _LOST, breaker_effect=BreakerEffect.OPEN, free=True
        )
    if isinstance(cause, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
        return "the connection was closed before an answer", replace(_LOST, stale=True)
    return f"the answer was cut or broken: {cause}", _LOST
