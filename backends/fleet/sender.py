"""One request to one endpoint: sent, judged and accounted for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import aiohttp
import orjson

from ..contract.calls import CallLog
from . import failures, judge
from .endpoint import Endpoint
from .failures import Failure, Step
from .stream import OpenStream
from .transport import Transport
from .warden import Warden


class Sender:
    """Sends to endpoints that were taken, and lets them go.

    Args:
        transport: The connections.
        warden: Is told how each request ended.
        simulated: Whether answers must come from a simulated fleet, must not, or are as the
            first one shows (None).

    Attributes:
        simulated: The same, settled by the first answer.
    """

    def __init__(self, transport: Transport, warden: Warden, simulated: bool | None) -> None:
        self._transport = transport
        self._warden = warden
        self.simulated = simulated

    async def send(
        self, endpoint: Endpoint, body: Mapping[str, Any], log: CallLog | None
    ) -> dict[str, Any] | Failure:
        """Send one request to one endpoint that was taken, and let it go."""
        started, level = time.monotonic(), endpoint.outstanding
        seconds: float | None = None
        try:
            result = await self._exchange(endpoint, body)
            if isinstance(result, Failure):
                self._failed(endpoint, result)
            else:
                seconds = time.monotonic() - started
                self._succeeded(endpoint, result, level, seconds, log)
            return result
        finally:
            if log is not None:
                log.requests += 1
                log.endpoint = endpoint.label
            self._warden.dispatch.give(endpoint, seconds)

    async def _exchange(
        self, endpoint: Endpoint, body: Mapping[str, Any]
    ) -> dict[str, Any] | Failure:
        try:
            headers = await endpoint.headers()
            answer = await self._transport.send(endpoint.chat_url, _encode(endpoint, body), headers)
            result = self._guarded(judge.read(answer, endpoint.label), endpoint)
            if isinstance(result, Failure):
                return await _rekeyed(endpoint, result, headers)
        except (aiohttp.ClientError, TimeoutError) as error:
            return failures.of_exception(error, endpoint.label)
        return result

    async def open(
        self, endpoint: Endpoint, body: Mapping[str, Any], log: CallLog | None
    ) -> tuple[OpenStream | Failure, Endpoint]:
        """Send one request to one endpoint that was taken; the stream lets it go."""
        started, level = time.monotonic(), endpoint.outstanding

        def end(summary: dict[str, Any] | None) -> None:
            seconds = None if summary is None else time.monotonic() - started
            if summary is not None and seconds is not None:
                self._succeeded(endpoint, summary, level, seconds, log)
                if isinstance(mixed := self._guarded(summary, endpoint), Failure):
                    self._failed(endpoint, mixed)
            self._warden.dispatch.give(endpoint, seconds)

        result: OpenStream | Failure | None = None
        try:
            result = await self._begin(endpoint, body, end)
            if isinstance(result, Failure):
                self._failed(endpoint, result)
            return result, endpoint
        finally:
            if log is not None:
                log.requests += 1
                log.endpoint = endpoint.label
            if not isinstance(result, OpenStream):
                self._warden.dispatch.give(endpoint)

    async def _begin(
        self, endpoint: Endpoint, body: Mapping[str, Any], end: Callable[..., None]
    ) -> OpenStream | Failure:
        try:
            headers = await endpoint.headers()
            response = await self._transport.stream(
                endpoint.chat_url, _encode(endpoint, body), headers
            )
            result = await OpenStream.begin(response, endpoint.label, end)
            if isinstance(result, Failure):
                return await _rekeyed(endpoint, result, headers)
        except (aiohttp.ClientError, TimeoutError) as error:
            return failures.of_exception(error, endpoint.label)
        return result

    def _failed(self, endpoint: Endpoint, failure: Failure) -> None:
        endpoint.stats.failed(type(failure.error).__name__)
        self._warden.failed(endpoint, failure)

    def _succeeded(
        self,
        endpoint: Endpoint,
        document: Mapping[str, Any],
        level: int,
        seconds: float,
        log: CallLog | None,
    ) -> None:
        """Account for a good answer."""
        usage = judge.usage_of(document)
        endpoint.stats.answered(seconds, usage)
        self._warden.succeeded(endpoint, level, seconds)
        if log is not None:
            log.usage += usage
            log.model = document.get("model")
            log.simulated = judge.is_simulated(document)

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


def _encode(endpoint: Endpoint, body: Mapping[str, Any]) -> bytes:
    if endpoint.spec.model is not None:
        body = {**body, "model": endpoint.spec.model}
    return orjson.dumps(body)


async def _rekeyed(endpoint: Endpoint, failure: Failure, sent: Mapping[str, str]) -> Failure:
    """Repeat a call whose key was refused if the key's source has a new one by now."""
    if failure.treatment.step is Step.REKEY and await endpoint.headers() != sent:
        return Failure(failure.error, replace(failure.treatment, step=Step.SAME))
    return failure
