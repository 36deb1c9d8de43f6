"""One request to one endpoint: sent, judged and accounted for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

import aiohttp
import orjson

from ..core.protocols import CallLog
from ..core.types import Usage
from . import failures, judge, room
from .charge import Charge
from .endpoint import Endpoint
from .failures import Failure, Step
from .pacing import Pacer, estimate
from .stream import OpenStream, Watch
from .transport import Transport
from .warden import Warden

_LOG: Final = logging.getLogger(__name__)


class Sender:
    """Sends to endpoints that were taken, and lets them go.

    Args:
        transport: The connections.
        warden: Is told how each request ended.
        pacer: The whole process' quotas, or None.
        simulated: Whether answers must come from a simulated fleet, must not, or are as the
            first one shows (None).

    Attributes:
        simulated: The same, settled by the first answer.
    """

    def __init__(
        self,
        transport: Transport,
        warden: Warden,
        pacer: Pacer | None,
        simulated: bool | None,
    ) -> None:
        self._transport = transport
        self._warden = warden
        self._pacer = pacer
        self._warned = False
        self.simulated = simulated

    async def send(
        self, endpoint: Endpoint, body: Mapping[str, Any], charge: Charge
    ) -> dict[str, Any] | Failure:
        """Send one request to one endpoint that was taken, and let it go."""
        started, level = time.monotonic(), endpoint.outstanding
        seconds: float | None = None
        charge.sent(endpoint)
        try:
            result = await self._exchange(endpoint, body, charge)
            if isinstance(result, Failure):
                self._failed(endpoint, result, body, charge)
            else:
                seconds = time.monotonic() - started
                self._succeeded(endpoint, result, level, seconds, charge)
            return result
        finally:
            endpoint.stats.lost(charge.lost())  # nothing when its end is known
            self._warden.dispatch.give(endpoint, seconds, charge.log)

    async def _exchange(
        self, endpoint: Endpoint, body: Mapping[str, Any], charge: Charge
    ) -> dict[str, Any] | Failure:
        headers: Mapping[str, str] | None = None
        try:
            headers, most = await endpoint.headers(), endpoint.most_tokens
            answer = await self._transport.send(
                endpoint.chat_url, self._encode(endpoint, body), headers, endpoint.spec.proxied
            )
            result = self._guarded(judge.read(answer, endpoint.label), endpoint)
            if isinstance(result, Failure):
                result = await self._softened(endpoint, result, headers, charge)
                return room.learn(endpoint, result, body, room.sent_tokens(body, most))
            self._accepted(endpoint, body, headers, charge.log)
        except (aiohttp.ClientError, TimeoutError) as error:
            return failures.of_exception(error, endpoint.label, headers)
        return result

    async def open(
        self, endpoint: Endpoint, body: Mapping[str, Any], charge: Charge
    ) -> tuple[OpenStream | Failure, Endpoint]:
        """Send one request to one endpoint that was taken; the stream lets it go."""
        started, level = time.monotonic(), endpoint.outstanding

        def end(summary: dict[str, Any] | Failure | None) -> None:
            seconds: float | None = None
            endpoint.streaming -= 1
            if charge.log is not None and charge.log.streams is not None:
                charge.log.streams.pop(charge, None)
            if isinstance(summary, dict):
                summary = self._guarded(summary, endpoint)
            if isinstance(summary, Failure):
                self._failed(endpoint, summary, body, charge)
            elif summary is not None:
                seconds = time.monotonic() - started
                self._succeeded(endpoint, summary, level, seconds, charge)
            endpoint.stats.lost(charge.lost())  # left early: nothing when its end is known
            self._warden.dispatch.give(endpoint, seconds, charge.log)

        result: OpenStream | Failure | None = None
        dispatch = self._warden.dispatch
        watch = Watch(
            partial(dispatch.pause, charge.log), partial(dispatch.resume, charge.log), end
        )
        charge.sent(endpoint)
        try:
            result = await self._begin(endpoint, body, charge, watch)
            if isinstance(result, Failure):
                self._failed(endpoint, result, body, charge)
                return result, endpoint
            endpoint.streaming += 1
            if charge.log is not None:
                charge.log.streams = charge.log.streams or {}
                charge.log.streams[charge] = _closer(result)
            return result, endpoint
        finally:
            if not isinstance(result, OpenStream):
                endpoint.stats.lost(charge.lost())
                self._warden.dispatch.give(endpoint, item=charge.log)

    async def _begin(
        self, endpoint: Endpoint, body: Mapping[str, Any], charge: Charge, watch: Watch
    ) -> OpenStream | Failure:
        headers: Mapping[str, str] | None = None
        try:
            headers, most = await endpoint.headers(), endpoint.most_tokens
            reader = await self._transport.stream(
                endpoint.chat_url, self._encode(endpoint, body), headers, endpoint.spec.proxied
            )
            result = await OpenStream.begin(
                reader, endpoint.label, self._transport.silence_s, watch
            )
            if isinstance(result, Failure):
                result = await self._softened(endpoint, result, headers, charge)
                return room.learn(endpoint, result, body, room.sent_tokens(body, most))
            self._accepted(endpoint, body, headers, charge.log)
        except (aiohttp.ClientError, TimeoutError) as error:
            return failures.of_exception(error, endpoint.label, headers)
        return result

    async def _softened(
        self,
        endpoint: Endpoint,
        failure: Failure,
        sent: Mapping[str, str],
        charge: Charge,
    ) -> Failure:
        """Let a refused call be repeated where it can be cured: with a new key, or elsewhere."""
        if failure.treatment.refusal:
            others = endpoint.accepts_others(charge.log, sent, time.monotonic())
            failure = replace(failure, accepts_others=others)
        mark = charge.marks.get(endpoint) if charge.marks else None
        if mark is not None and failure.names_pause:
            alone = endpoint.refuses_alone(charge.log, mark)
            failure = replace(failure, accepts_others=alone)
        if failure.treatment.step is Step.REKEY and await endpoint.rekeyed(sent):
            return replace(failure, treatment=replace(failure.treatment, step=Step.SAME))
        if failure.treatment.schema and self._warden.answers and not endpoint.has_answered:
            # Others take the schema: it is this endpoint that lacks something.
            return replace(failure, treatment=replace(failure.treatment, step=Step.EJECT))
        return failure

    def _accepted(
        self,
        endpoint: Endpoint,
        body: Mapping[str, Any],
        sent: Mapping[str, str],
        item: CallLog | None,
    ) -> None:
        """Note what an endpoint has accepted."""
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        if asked is not endpoint.longest_asked:  # nearly all requests of a run ask the same
            endpoint.longest_asked = asked
            most = room.sent_tokens(body, endpoint.most_tokens)
            endpoint.longest = max(endpoint.longest, most or 0)
        endpoint.accept(item, sent, time.monotonic())
        if endpoint.doubts:
            self._warden.clear(endpoint, item)

    def _failed(
        self, endpoint: Endpoint, failure: Failure, body: Mapping[str, Any], charge: Charge
    ) -> None:
        endpoint.stats.failed(type(failure.error).__name__)
        endpoint.stats.lost(charge.failed(failure))
        # Who refuses has read nothing; what a lost request cost is unknown, and stays reserved.
        if failure.error.status is not None:
            self._settle(endpoint, body, Usage(0, 0))
        self._warden.failed(endpoint, failure, charge.log)

    def _succeeded(
        self,
        endpoint: Endpoint,
        document: Mapping[str, Any],
        level: int,
        seconds: float,
        charge: Charge,
    ) -> None:
        """Account for a good answer."""
        usage, model = judge.usage_of(document), document.get("model")
        self._settle(endpoint, charge.body, usage)
        charge.answered(usage, model if isinstance(model, str) else None)
        endpoint.stats.answered(seconds, usage)
        self._warden.succeeded(endpoint, level, seconds)
        if charge.log is not None:
            charge.log.simulated = judge.is_simulated(document)

    def _guarded(
        self, result: dict[str, Any] | Failure, endpoint: Endpoint
    ) -> dict[str, Any] | Failure:
        """Keep simulated and real answers apart."""
        if isinstance(result, Failure):
            return result
        simulated = judge.is_simulated(result)
        if self.simulated is None:
            self.simulated = simulated
        if simulated is self.simulated:
            return result
        return failures.of_mixture(endpoint.label, simulated)

    def _settle(self, endpoint: Endpoint, body: Mapping[str, Any], usage: Usage) -> None:
        """Correct what was reserved for a request by what it used, in tokens."""
        if usage.prompt is None or (self._pacer is None and endpoint.tokens is None):
            return
        used = usage.prompt + (usage.completion or 0)
        if self._pacer is not None:
            self._pacer.settle(estimate(body), used)
        if endpoint.tokens is not None:
            endpoint.tokens.refund(estimate(body) - used)

    def _encode(self, endpoint: Endpoint, body: Mapping[str, Any]) -> bytes:
        if endpoint.spec.model is not None:
            body = {**body, "model": endpoint.spec.model}
        if endpoint.most_tokens is not None:
            fitting = room.lowered(body, endpoint.most_tokens)
            if fitting is not body and not self._warned:
                self._warned = True
                _LOG.warning(
                    "max_tokens is lowered to %d, which is all that %s allows: lower "
                    "model.max_tokens",
                    endpoint.most_tokens,
                    endpoint.label,
                )
            body = fitting
        return orjson.dumps(body)


def _closer(stream: OpenStream) -> Callable[[], None]:
    """Return what closes a stream, from whichever thread."""
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
