"""One request to one endpoint: context length, reservation, send, outcome."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import orjson

from ..core.errors import ConfigurationError, PromptTooLongError
from ..core.images import count_image_tokens, drop_images
from ..core.lazy_tls import aiohttp
from ..core.protocols import CallLog, EndpointUsage, Reservation
from ..core.request_urls import URL_FIELD, bound_usage, get_kind
from ..core.types import CHAT_URL, Usage
from . import failures, transport
from .endpoint import Endpoint, RefusalMark
from .failures import ErrorBody, Failure, HTTPAnswer, RetryAction, may_have_used
from .files import encode_form
from .health import HealthMonitor
from .rate_limit import TokenNeed
from .transport import OpenStream, StreamHooks, Transport

_TEMPLATE: Final = 64
"""Tokens that a chat template adds: markers, a fixed system text."""
_PER_MESSAGE: Final = 8
_NO_USAGE: Final = Usage()


def max_usage(body: Mapping[str, Any]) -> Usage:
    """Return the most tokens that a request may use.

    The tokenizers of today's models work on bytes: a token stands for one byte at least. Images
    are counted by their size in pixels.
    """
    if (kind := get_kind(body)) is not None:
        return bound_usage(body, kind)
    messages = drop_images(body["messages"])
    texts = [messages, body.get("tools"), body.get("response_format")]
    size = sum(len(orjson.dumps(text)) for text in texts if text)
    prompt = size + count_template(body)
    if messages is not body["messages"]:
        prompt += count_image_tokens(body["messages"])
    answer = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    return Usage(prompt, int(answer) * int(body.get("n") or 1))


def count_template(body: Mapping[str, Any]) -> int:
    """Return the most tokens that the chat template of a model adds to a request's texts."""
    return _PER_MESSAGE * len(body["messages"]) + _TEMPLATE


class LostRequests:
    """The requests of one call whose answers are lost, until the call ends.

    All requests of a call have the same prompt: its answer reveals how many tokens the lost ones
    were charged for their prompts.
    """

    def __init__(self) -> None:
        self._charges: list[tuple[RequestCharge, Endpoint]] = []
        self._has_ended = False

    def add(self, charge: RequestCharge, endpoint: Endpoint) -> bool:
        """Add a request; return False if the call has ended."""
        if not self._has_ended:
            self._charges.append((charge, endpoint))
        return not self._has_ended

    def settle(self, answer: object) -> None:
        """Settle all requests at the end of the call.

        Args:
            answer: The answer that counts; None if there is none. A stream's length is not known
                yet.
        """
        self._has_ended = True
        if not self._charges:
            return
        prompt = transport.read_usage(answer).prompt if isinstance(answer, dict) else None
        for charge, endpoint in self._charges:
            charge.is_deferred, charge.prompt_tokens = False, prompt
            endpoint.stats.add_lost(charge.settle_lost())


@dataclass(slots=True, eq=False)
class RequestCharge:
    """The cost of one request of an item; the first of its ends counts.

    Attributes:
        log: The item's log, or None.
        body: The request as it is sent; its answer may be limited further than that of the call.
        reservation: What is reserved for it; None if there is no limit, or it has ended.
        ended: Whether its end is known.
        endpoint_usage: The item's usage of its endpoint; None until it is sent, or without a log.
        attempt: The request's entry in the item's record; None as for ``endpoint_usage``, or if the
            record is full.
        sent_at: Monotonic time in seconds when it was sent.
        level: Requests in flight to its endpoint then, its own included.
        marks: Endpoints that have refused the call for now before, with their counts at that time;
            None for its first request.
        need: Its tokens at most, as they are reserved with quotas; None if none counts tokens.
        prompt_tokens: Tokens of its prompt, as an answer to the same request reports them; None if
            unknown.
        lost: The lost requests of its call; None settles it at once if it is lost.
        is_deferred: Whether it is lost, and settled at the end of its call.
    """

    log: CallLog | None
    body: Mapping[str, Any]
    reservation: Reservation | None = None
    ended: bool = False
    endpoint_usage: EndpointUsage | None = None
    attempt: dict[str, Any] | None = None
    sent_at: float = 0.0
    level: int = 0
    marks: Mapping[Endpoint, RefusalMark] | None = None
    need: TokenNeed | None = None
    prompt_tokens: int | None = None
    lost: LostRequests | None = None
    is_deferred: bool = False

    @property
    def tokens(self) -> int:
        """Return the tokens that are reserved for it with quotas."""
        return 0 if self.need is None else self.need.tokens

    @classmethod
    async def reserve(
        cls,
        log: CallLog | None,
        body: Mapping[str, Any],
        lost: LostRequests | None = None,
        *,
        shorten: bool = False,
    ) -> RequestCharge:
        """Reserve the maximum cost of a request.

        Args:
            log: The item's log, or None.
            body: The request.
            lost: The lost requests of its call, or None.
            shorten: Whether its answer may be limited further if the budget is short.

        Raises:
            BudgetExhaustedError: The budget does not cover it.
            ConfigurationError: The length of its answer is unlimited.
        """
        if log is None or log.account is None:
            return cls(log, body, lost=lost)
        if not has_limited_answer(body):
            msg = (
                "a budget is set, but a request has no max_tokens, so its cost is unlimited; keep "
                "the model's configured max_tokens, or set one in the call"
            )
            raise ConfigurationError(msg)
        most = max_usage(body)
        # Other kinds of requests, those for several answers, and odd limits keep their limit.
        shorten = shorten and URL_FIELD not in body and read_max_tokens(body) == most.completion
        reservation = await log.account.reserve(most, body, log, shorten=shorten)
        answer = reservation.usage.completion
        if answer is not None and answer != most.completion:
            body = lower_max_tokens(body, answer)
        return cls(log, body, reservation, lost=lost)

    def reserve_again(self) -> RequestCharge | None:
        """Reserve the same for a second request, if the budget covers it at once."""
        if self.log is None or self.log.account is None:
            return RequestCharge(self.log, self.body, marks=self.marks, lost=self.lost)
        reserved = self.log.account.try_reserve(max_usage(self.body))
        if reserved is None:
            return None
        return RequestCharge(self.log, self.body, reserved, marks=self.marks, lost=self.lost)

    def record_sent(self, endpoint: Endpoint) -> None:
        """Count the request as sent."""
        self.sent_at, self.level = time.monotonic(), endpoint.in_flight
        if self.log is not None:
            self.log.requests += 1
            self.log.sent[self] = self.body
            self.endpoint_usage = self.log.get_endpoint_usage(endpoint.label, endpoint.stats)
            self.endpoint_usage.requests += 1
            self.attempt = self.log.begin_attempt(endpoint.label)

    def settle_answered(self, usage: Usage, model: str | None) -> None:
        """Settle a request that was answered.

        Args:
            usage: Tokens that the answer reports.
            model: The model's name in it.
        """
        self._end_attempt("answered")
        if self._mark_ended() and self.reservation is not None:
            self.reservation.settle(usage)
        if self.log is not None and self.endpoint_usage is not None:
            self.log.usage += usage
            self.log.model = self.endpoint_usage.model = model
            self.endpoint_usage.usage += usage

    def settle_failed(self, failure: Failure, endpoint: Endpoint | None = None) -> Usage:
        """Settle a failed request; return the tokens that may have been paid for nothing.

        Args:
            failure: How it failed.
            endpoint: Where it was sent; a lost request is then settled at the end of its call.
        """
        if self.log is not None and self.endpoint_usage is not None:
            self.log.endpoint = self.endpoint_usage.endpoint
        self._end_attempt(type(failure.error).__name__)
        if may_have_used(failure):
            if endpoint is not None and self.lost is not None and not self.ended:
                self.is_deferred = self.lost.add(self, endpoint)
            return self.settle_lost()
        self.release(sent=failure.error.status is not None)
        return _NO_USAGE

    def settle_lost(self) -> Usage:
        """Settle a request whose answer is lost; return the most tokens that it may have cost."""
        if self.is_deferred or not self._mark_ended():
            return _NO_USAGE
        self._end_attempt("cancelled")
        if self.prompt_tokens is not None:
            most = Usage(self.prompt_tokens, max_usage(self.body).completion)
            if self.reservation is not None:
                self.reservation.settle(most)
        elif self.reservation is not None:
            most = self.reservation.settle_all()
        else:
            most = max_usage(self.body)
        if self.log is not None:
            self.log.lost += most
        if self.endpoint_usage is not None:
            self.endpoint_usage.lost += most
        return most

    def release(self, *, sent: bool) -> None:
        """Settle a request that no server has read."""
        if self._mark_ended() and self.reservation is not None:
            self.reservation.release(sent=sent)

    def _end_attempt(self, outcome: str) -> None:
        """Record how the request ended, once."""
        if self.attempt is not None:
            self.attempt["seconds"] = int(1000 * (time.monotonic() - self.sent_at)) / 1000
            self.attempt["outcome"] = outcome
            self.attempt = None

    def _mark_ended(self) -> bool:
        first, self.ended = not self.ended, True
        if first and self.log is not None:
            self.log.sent.pop(self, None)
        return first


_FIELDS: Final = ("max_completion_tokens", "max_tokens")


def has_limited_answer(body: Mapping[str, Any]) -> bool:
    """Return True if the length of a request's answer is limited, or the model writes none."""
    kind = get_kind(body)
    if kind is not None and not kind.generates:
        return True
    return bool(body.get("max_completion_tokens") or body.get("max_tokens"))


def read_max_tokens(body: Mapping[str, Any]) -> int | None:
    """Return the longest answer that a request asks for, in tokens, or None."""
    for field in _FIELDS:
        if isinstance(most := body.get(field), int):
            return most
    return None


def lower_max_tokens(body: Mapping[str, Any], most: int) -> Mapping[str, Any]:
    """Return the request with its answer limited to ``most`` tokens."""
    above = [f for f in _FIELDS if isinstance(body.get(f), int) and body[f] > most]
    return {**body, **dict.fromkeys(above, most)} if above else body


def learn_max_tokens(
    endpoint: Endpoint, failure: Failure, body: Mapping[str, Any], asked: int | None
) -> Failure:
    """Learn from a refusal the longest answer that a request can ask for.

    The length that is left for an answer may depend on the prompt. So the reported length applies
    to the refused request only; to others once the endpoint has reported the same for a different
    request, and has never accepted more.

    Args:
        endpoint: The endpoint that refused.
        failure: Its refusal; only refusals of the answer's length are evaluated.
        body: The request.
        asked: The longest answer in tokens that it was sent with.

    Returns:
        The failure, to be repeated if a shorter answer can be requested.
    """
    cause = failure.error.__cause__
    if not failure.rule.length or asked is None or not isinstance(cause, HTTPAnswer):
        return failure
    most = failures.find_lower_number(ErrorBody.parse(cause.body).message, asked)
    if most is None:
        return failure
    if most >= endpoint.longest and endpoint.confirm_max_tokens(
        most, hash(orjson.dumps(body.get("messages") or body.get("prompt")))
    ):
        endpoint.max_answer_tokens = min(most, endpoint.max_answer_tokens or most)
    return Failure(failure.error, replace(failure.rule, action=RetryAction.SAME, free=True), most)


def resolve_max_tokens(body: Mapping[str, Any], most: int | None) -> int | None:
    """Return the longest answer in tokens that a request is sent with, or None.

    Args:
        body: The request.
        most: The longest answer that its endpoint allows, or None if unknown.
    """
    asked = read_max_tokens(body)
    return asked if asked is None or most is None else min(asked, most)


def redirect_long_prompt(
    endpoint: Endpoint, failure: Failure, alive: Iterable[Endpoint]
) -> tuple[Failure, Set[Endpoint]]:
    """Send a prompt that is too long for one endpoint to one with a longer context.

    Returns:
        The failure, to be repeated if there is one; and all endpoints that are too short.
    """
    length = endpoint.spec.max_model_len
    if not isinstance(failure.error, PromptTooLongError) or length is None:
        return failure, frozenset()
    short = {e for e in alive if (e.spec.max_model_len or 0) <= length}
    if short.issuperset(alive):
        return failure, frozenset()
    return Failure(failure.error, replace(failure.rule, action=RetryAction.OTHER)), short


_LOG: Final = logging.getLogger(__name__)


class RequestSender:
    """Sends requests to acquired endpoints, and releases the endpoints.

    Args:
        transport: The connections.
        monitor: Receives the outcome of each request.
        simulated: Whether answers must come from a simulated fleet, must not, or may be either, as
            the first one shows (None).
        own_fields: Whether each request chooses its fields itself.
        optional_fields: Fields without which a request is sent to endpoints that refuse them.

    Attributes:
        simulated: The same, settled by the first answer.
    """

    def __init__(
        self,
        transport: Transport,
        monitor: HealthMonitor,
        simulated: bool | None,
        own_fields: bool = False,
        optional_fields: frozenset[str] = frozenset(),
    ) -> None:
        self._transport = transport
        self._own_fields, self._optional_fields = own_fields, optional_fields
        self._monitor = monitor
        self._warned = False
        self.simulated = simulated

    def send(
        self, endpoint: Endpoint, body: Mapping[str, Any], charge: RequestCharge
    ) -> Awaitable[tuple[dict[str, Any] | Failure, Endpoint]]:
        """Send one request to an acquired endpoint, and release the endpoint."""
        return self._exchange(endpoint, body, charge, streamed=False)

    def open_stream(
        self, endpoint: Endpoint, body: Mapping[str, Any], charge: RequestCharge
    ) -> Awaitable[tuple[OpenStream | Failure, Endpoint]]:
        """Send one request to an acquired endpoint; the stream releases the endpoint."""
        return self._exchange(endpoint, body, charge, streamed=True)

    async def _exchange(
        self, endpoint: Endpoint, body: Mapping[str, Any], charge: RequestCharge, *, streamed: bool
    ) -> tuple[Any, Endpoint]:
        headers: Mapping[str, str] | None = None
        outcome: dict[str, Any] | OpenStream | Failure | None = None
        task = asyncio.current_task()
        assert task is not None, "a request is sent from a task"
        cancelling = task.cancelling()
        charge.record_sent(endpoint)
        try:
            headers, most = await endpoint.headers(), endpoint.max_answer_tokens
            kind, url = get_kind(body), endpoint.get_request_url(body)
            whole = streamed or (kind is not None and not kind.generates)
            data, form = self._encode(endpoint, body if whole else {**body, "stream": False})
            proxied = endpoint.spec.proxied
            result: dict[str, Any] | OpenStream | Failure
            endpoint.unanswered[task] = charge.sent_at
            self._monitor.watch_silence()
            if streamed:
                reader = await self._transport.stream(
                    url, data, self._add_headers(headers, body, form), proxied
                )
                hooks = self._make_hooks(endpoint, charge)
                silence_s = self._transport.silence_s
                result = await OpenStream.begin(reader, endpoint.label, silence_s, hooks)
                endpoint.record_heard(task)
            else:
                answer = await self._transport.send(
                    url, data, self._add_headers(headers, body, form), proxied
                )
                endpoint.record_heard(task)
                result = self.check_simulated(
                    transport.read_answer(answer, endpoint.label, body.get(URL_FIELD, CHAT_URL)),
                    endpoint,
                )
            if isinstance(result, Failure):
                if not self._own_fields:
                    result = self._check_refused_field(endpoint, result, body)
                result = await self._soften_failure(endpoint, result, headers, charge)
                outcome = learn_max_tokens(endpoint, result, body, resolve_max_tokens(body, most))
            else:
                self._record_accepted(endpoint, body, headers, charge.log)
                outcome = result
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome = failures.classify_exception(error, endpoint.label, headers)
        except asyncio.CancelledError:
            outcome = self._monitor.lost.pop(task, None)
            if outcome is None or task.uncancel() > cancelling:
                raise
        finally:
            endpoint.unanswered.pop(task, None)
            if isinstance(outcome, OpenStream):
                endpoint.streaming += 1
                if charge.log is not None:
                    charge.log.streams = charge.log.streams or {}
                    charge.log.streams[charge] = _closer(outcome)
            else:
                self._end(endpoint, charge, outcome)
        return outcome, endpoint

    def _add_headers(
        self, headers: Mapping[str, str], body: Mapping[str, Any], form: str | None
    ) -> Mapping[str, str]:
        """Return the headers of a request with that of its session, and the type of a form."""
        if form is not None:
            headers = {**headers, "Content-Type": form}
        session = self._transport.session_policy
        if session is None:
            return headers
        return {**headers, **session.make_headers(body.get("messages") or ())}

    def _make_hooks(self, endpoint: Endpoint, charge: RequestCharge) -> StreamHooks:
        log, balancer = charge.log, self._monitor.balancer

        def end(outcome: dict[str, Any] | Failure | None) -> None:
            endpoint.streaming -= 1
            if log is not None and log.streams is not None:
                log.streams.pop(charge, None)
            if outcome is not None:
                outcome = self.check_simulated(outcome, endpoint)
            self._end(endpoint, charge, outcome)

        return StreamHooks(
            partial(balancer.mark_stream_idle, log), partial(balancer.mark_stream_read, log), end
        )

    def _end(
        self, endpoint: Endpoint, charge: RequestCharge, outcome: dict[str, Any] | Failure | None
    ) -> None:
        """Record a request's outcome, None if it was abandoned, and release its endpoint."""
        seconds: float | None = None
        used = charge.tokens
        try:
            if isinstance(outcome, Failure):
                used = charge.tokens if may_have_used(outcome) else 0
                self._record_failure(endpoint, outcome, charge)
            elif outcome is not None:
                seconds = time.monotonic() - charge.sent_at
                usage = self._record_success(endpoint, outcome, seconds, charge)
                if charge.need is not None:
                    used = charge.need.settle(usage)
        finally:
            endpoint.stats.add_lost(charge.settle_lost())  # nothing if its end is known
            self._monitor.balancer.release(endpoint, seconds, charge.log, charge.tokens, used)

    def _check_refused_field(
        self, endpoint: Endpoint, failure: Failure, body: Mapping[str, Any]
    ) -> Failure:
        """Classify a refused field; without an optional one the request is repeated."""
        failure = failures.classify_refused_field(failure, body)
        field = failure.refused_field
        if field not in self._optional_fields:
            return failure
        if field not in endpoint.refused_fields:
            endpoint.refused_fields |= {field}
            _LOG.warning(
                "%s refuses the field %s, and is asked without it: its answers have no certainty",
                endpoint.label,
                field,
            )
        rule = replace(failure.rule, action=RetryAction.SAME, free=True, constant=False)
        return replace(failure, rule=rule)

    async def _soften_failure(
        self,
        endpoint: Endpoint,
        failure: Failure,
        sent: Mapping[str, str],
        charge: RequestCharge,
    ) -> Failure:
        """Allow a retry of a refused call if it can help: with a new key or on another endpoint."""
        if failure.rule.refusal:
            others = endpoint.accepts_others(charge.log, sent, time.monotonic())
            failure = replace(failure, accepts_others=others)
        mark = charge.marks.get(endpoint) if charge.marks else None
        if mark is not None and failure.has_known_pause and not failure.is_quota:
            alone = endpoint.refuses_alone(charge.log, mark, time.monotonic())
            failure = replace(failure, accepts_others=alone)
        if failure.rule.action is RetryAction.REKEY and await endpoint.renew_key(sent):
            return replace(failure, rule=replace(failure.rule, action=RetryAction.SAME))
        if failure.rule.constant and self._monitor.answers and not endpoint.has_answered:
            # Other endpoints accept the field: this one does not support it.
            return replace(failure, rule=replace(failure.rule, action=RetryAction.EJECT))
        return failure

    def _record_accepted(
        self,
        endpoint: Endpoint,
        body: Mapping[str, Any],
        sent: Mapping[str, str],
        item: CallLog | None,
    ) -> None:
        """Record that an endpoint has accepted a request."""
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        if item is not None:
            most = endpoint.max_answer_tokens
            item.max_tokens = asked if most is None else resolve_max_tokens(body, most)
        if asked is not endpoint.longest_asked:  # nearly all requests of a run ask the same
            endpoint.longest_asked = asked
            most = resolve_max_tokens(body, endpoint.max_answer_tokens)
            endpoint.longest = max(endpoint.longest, most or 0)
        endpoint.record_accepted(item, sent, time.monotonic())
        if endpoint.refused_items:
            self._monitor.clear_refusals(endpoint, item)

    def _record_failure(self, endpoint: Endpoint, failure: Failure, charge: RequestCharge) -> None:
        endpoint.stats.add_failure(type(failure.error).__name__)
        endpoint.stats.add_lost(charge.settle_failed(failure, endpoint))
        self._monitor.record_failure(endpoint, failure, charge.log)

    def _record_success(
        self,
        endpoint: Endpoint,
        document: Mapping[str, Any],
        seconds: float,
        charge: RequestCharge,
    ) -> Usage:
        """Record a good answer; return its usage."""
        usage, model = transport.read_usage(document), document.get("model")
        charge.settle_answered(usage, model if isinstance(model, str) else None)
        endpoint.stats.add_answer(seconds, usage)
        self._monitor.record_success(endpoint, charge.level, seconds)
        if charge.log is not None:
            charge.log.simulated = transport.is_simulated(document)
        return usage

    def check_simulated(
        self, result: dict[str, Any] | Failure, endpoint: Endpoint
    ) -> dict[str, Any] | Failure:
        """Reject an answer that would mix simulated and real ones."""
        if isinstance(result, Failure):
            return result
        simulated = transport.is_simulated(result)
        if self.simulated is None:
            self.simulated = simulated
        if simulated is self.simulated:
            return result
        return failures.classify_mixture(endpoint.label, simulated)

    def _encode(self, endpoint: Endpoint, body: Mapping[str, Any]) -> tuple[bytes, str | None]:
        """Return a request as it is sent, and its content type if that is a form."""
        kind = get_kind(body)
        if endpoint.spec.model is not None:
            body = {**body, "model": endpoint.spec.model}
        if kind is not None:
            body = {name: value for name, value in body.items() if name != URL_FIELD}
        if endpoint.refused_fields:
            body = {name: one for name, one in body.items() if name not in endpoint.refused_fields}
        if endpoint.max_answer_tokens is not None:
            fitting = lower_max_tokens(body, endpoint.max_answer_tokens)
            if fitting is not body and not self._warned:
                self._warned = True
                _LOG.warning(
                    "max_tokens lowered to %d, the limit of %s: lower model.max_tokens",
                    endpoint.max_answer_tokens,
                    endpoint.label,
                )
            body = fitting
        if kind is not None and kind.file is not None:
            return encode_form(body)
        return orjson.dumps(body), None


def _closer(stream: OpenStream) -> Callable[[], None]:
    """Return a function that closes a stream from any thread."""
    home = asyncio.get_running_loop()

    def close() -> None:
        try:
            here = asyncio.get_running_loop() is home
        except RuntimeError:
            here = False
        if here:
            stream.close()
        elif not home.is_closed():
            home.call_soon_threadsafe(stream.close)

    return close
