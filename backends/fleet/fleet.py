"""The fleet: many endpoints behind one call, the only place where requests are sent.

Balancing, retries, accounting and the mapping of errors happen here and nowhere else; every door
(the lower one, LangChain's, streams) comes through.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Self, TypeVar

import aiohttp
import orjson

from ..contract.calls import CURRENT_CALLS
from ..contract.errors import (
    ConfigurationError,
    EndpointError,
    FanfoldError,
    RunStoppedError,
)
from . import failures, judge
from .attempts import Attempts
from .bridge import SyncBridge
from .dispatch import Dispatcher
from .endpoint import Endpoint, EndpointSpec
from .failures import Failure, Step
from .policy import FleetPolicy
from .stream import OpenStream
from .transport import Transport

_LOG: Final = logging.getLogger(__name__)
_T = TypeVar("_T")


class Fleet:
    """A set of endpoints that serve one model, used as one.

    Use it as an async context manager, or call ``aclose``; it opens its connections with the
    first request, in the loop that sends it.

    Args:
        endpoints: The members; at least one.
        policy: Limits, retries and timeouts.
        simulated: Whether answers must come from a simulated fleet (True), must not (False),
            or are as the first answer shows (None).

    Raises:
        ConfigurationError: No endpoint, or one with a malformed URL.
    """

    def __init__(
        self,
        endpoints: Sequence[EndpointSpec],
        policy: FleetPolicy | None = None,
        *,
        simulated: bool | None = None,
    ) -> None:
        if not endpoints:
            raise ConfigurationError("a fleet needs at least one endpoint: set endpoints")
        self.policy = policy or FleetPolicy()
        self.endpoints = tuple(Endpoint(spec) for spec in endpoints)
        self.simulated = simulated
        self._specs = tuple(endpoints)
        self._transport = Transport(self.policy)
        self._dispatch = Dispatcher(self.endpoints, self.policy.streams)
        self._twins: dict[asyncio.AbstractEventLoop, Fleet] = {}
        self.bridge = SyncBridge(lambda: self.loop, self._disconnect)
        self._stopped: str | None = None
        self._answers = 0
        self._refusals = 0

    def __repr__(self) -> str:
        """Show size and load, no keys."""
        return f"Fleet({len(self.endpoints)} endpoints, {self._dispatch.in_flight} in flight)"

    async def __aenter__(self) -> Self:
        """Return the fleet itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections that belong to the running loop, and end the private one."""
        await asyncio.to_thread(self.bridge.close)
        await self._disconnect()

    def close(self) -> None:
        """Close what synchronous calls opened; for callers that have no loop."""
        self.bridge.close()

    async def _disconnect(self) -> None:
        here = self.here()
        if here is self:
            await self._transport.aclose()
        else:
            await here.aclose()
            del self._twins[asyncio.get_running_loop()]

    def here(self) -> Fleet:
        """Return the fleet of the running loop: this one, or a twin with its own connections.

        Connections belong to the loop that opened them. Limits hold per loop.
        """
        loop = asyncio.get_running_loop()
        home = self._transport.loop
        if home is loop or home is None or home.is_closed():
            return self
        if loop not in self._twins:
            self._twins = {k: v for k, v in self._twins.items() if not k.is_closed()}
            self._twins[loop] = Fleet(self._specs, self.policy, simulated=self.simulated)
        return self._twins[loop]

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop that the fleet's connections belong to, or None."""
        return self._transport.loop

    @property
    def in_flight(self) -> int:
        """Requests in flight over all endpoints."""
        return self._dispatch.in_flight

    async def post(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], Endpoint]:
        """Send one chat request and return its answer.

        Args:
            body: The request as the endpoints take it, ``messages`` included.

        Returns:
            The decoded answer, which is a chat completion, and the endpoint that gave it.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: Asking on is hopeless for every item.
        """
        return await self._repeat(body, self._send)

    async def open_stream(self, body: Mapping[str, Any]) -> tuple[OpenStream, Endpoint]:
        """Send one chat request whose answer is read token by token.

        Until the first chunk has come the call moves between endpoints like any other; from
        then on a failure is the caller's.

        Args:
            body: The request; ``stream`` must be true in it.

        Raises:
            EndpointError: No endpoint began to answer within the attempts allowed.
            RunStoppedError: Asking on is hopeless for every item.
        """
        return await self._repeat(body, self._open)

    async def _repeat(
        self,
        body: Mapping[str, Any],
        send: Callable[[Endpoint, Mapping[str, Any]], Awaitable[_T | Failure]],
    ) -> tuple[_T, Endpoint]:
        attempts: Attempts | None = None
        while True:
            if self._stopped is not None:
                raise RunStoppedError(self._stopped)
            endpoint = await self._dispatch.take(attempts.avoid if attempts else ())
            result = await send(endpoint, body)
            if not isinstance(result, Failure):
                return result, endpoint
            attempts = attempts or Attempts(self.policy.retry)
            self._react(endpoint, result)
            if (pause := attempts.after(endpoint, result, random.random())) > 0:
                await asyncio.sleep(pause)

    async def _send(self, endpoint: Endpoint, body: Mapping[str, Any]) -> dict[str, Any] | Failure:
        started = time.monotonic()
        taken: float | None = None
        try:
            answer = await self._transport.send(
                endpoint.chat_url, self._encode(endpoint, body), await self._headers(endpoint)
            )
            result = judge.read(answer, endpoint.label)
            if not isinstance(result, Failure):
                taken = time.monotonic() - started
        except (aiohttp.ClientError, TimeoutError) as error:
            result = failures.of_exception(error, endpoint.label)
        finally:
            self._dispatch.give(endpoint, taken)
        self._note(endpoint, None if isinstance(result, Failure) else result)
        return result

    async def _open(self, endpoint: Endpoint, body: Mapping[str, Any]) -> OpenStream | Failure:
        handed_over = False
        try:
            response = await self._transport.stream(
                endpoint.chat_url, self._encode(endpoint, body), await self._headers(endpoint)
            )
            result = await OpenStream.begin(response, endpoint, self._dispatch.give, self._note)
            handed_over = not isinstance(result, Failure)
        except (aiohttp.ClientError, TimeoutError) as error:
            result = failures.of_exception(error, endpoint.label)
        finally:
            if not handed_over:
                self._dispatch.give(endpoint)
        if isinstance(result, Failure):
            self._note(endpoint, None)
        return result

    def _encode(self, endpoint: Endpoint, body: Mapping[str, Any]) -> bytes:
        if endpoint.model is not None:
            body = {**body, "model": endpoint.model}
        return orjson.dumps(body)

    async def _headers(self, endpoint: Endpoint) -> dict[str, str]:
        key = await endpoint.key()
        return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def _note(self, endpoint: Endpoint, document: dict[str, Any] | None) -> None:
        """Account for one request in the log of the item it was sent for."""
        log = CURRENT_CALLS.get()
        if log is not None:
            log.requests += 1
            log.endpoint = endpoint.label
        if document is None:
            return
        self._answers += 1
        simulated = judge.is_simulated(document)
        if log is not None:
            log.usage += judge.usage_of(document)
            log.model = document.get("model")
            log.simulated = simulated
        if simulated is not self.simulated:
            self._guard(endpoint, simulated)

    def _guard(self, endpoint: Endpoint, simulated: bool) -> None:
        """Keep simulated and real answers apart."""
        if self.simulated is None:
            self.simulated = simulated
            return
        kind, other = ("simulated", "real") if simulated else ("real", "simulated")
        self._stop(
            f"{endpoint.label} gives {kind} answers in a run of {other} ones; they never mix: "
            "start another run, or correct endpoints"
        )

    def _react(self, endpoint: Endpoint, failure: Failure) -> None:
        """Do what a failure means for the endpoint and for the whole run."""
        step, error = failure.treatment.step, failure.error
        if step is Step.STOP:
            self._stop(error.message, error)
        if step in {Step.EJECT, Step.REKEY}:
            self._eject(endpoint, error)
        if step is Step.WAIT:
            self._rest(endpoint, error.retry_after or failure.treatment.rest_s)
        if step is Step.FAIL:
            self._count_refusal(failure)

    def _count_refusal(self, failure: Failure) -> None:
        self._refusals += 1
        hopeless = self._refusals >= self.policy.retry.hopeless_after
        if not self._answers and (hopeless or failure.treatment.schema):
            self._stop(f"no request was accepted; the last: {failure.error.message}", failure.error)

    def _eject(self, endpoint: Endpoint, error: EndpointError) -> None:
        if not endpoint.alive:
            return
        endpoint.alive = False
        _LOG.warning("endpoint %s is used no more: %s", endpoint.label, error.message)
        self._dispatch.refresh(endpoint)
        if not self._dispatch.alive:
            self._stop(f"no endpoint is left; the last said: {error.message}", error)

    def _rest(self, endpoint: Endpoint, seconds: float | None) -> None:
        """Send an endpoint nothing for a while."""
        if endpoint.resting:
            return
        endpoint.resting = True
        pause = seconds or self.policy.retry.refusal_pause_s

        def wake() -> None:
            endpoint.resting = False
            self._dispatch.refresh(endpoint)

        asyncio.get_running_loop().call_later(pause, wake)

    def _stop(self, message: str, cause: FanfoldError | None = None) -> None:
        """End the run: no further request is sent.

        Raises:
            RunStoppedError: Always.
        """
        self._stopped = message
        stopped = RunStoppedError(message)
        self._dispatch.fail_all(RunStoppedError(message))
        raise stopped from cause
