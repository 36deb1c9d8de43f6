"""What the fleets of a process have learned, for the next fleet over the same endpoints."""

from __future__ import annotations

from collections.abc import Hashable

from .endpoint import Endpoint, EndpointSpec, identify_endpoint
from .policy import FleetPolicy, RateLimitPolicy
from .rate_limit import RateLimiter
from .transport import Transport


class FleetMemory:
    """Connections, quotas and the state of endpoints that outlive a fleet.

    Fleets of one event loop that follow each other share it: a fleet goes on with the adaptive
    limit, the circuit breaker, the pause and the speed of each endpoint that an earlier one has
    used, and with what is used of the quotas. Statistics, and all that decides about a run, begin
    anew with each fleet.
    """

    def __init__(self) -> None:
        self._limiters = dict[RateLimitPolicy, RateLimiter]()
        self._transports = dict[Hashable, Transport]()
        self._endpoints = dict[Hashable, Endpoint]()

    def get_limiter(self, policy: RateLimitPolicy) -> RateLimiter:
        """Return the quotas of a policy."""
        if policy not in self._limiters:
            self._limiters[policy] = RateLimiter(policy)
        return self._limiters[policy]

    def get_transport(self, policy: FleetPolicy) -> Transport:
        """Return the connections for a policy; only this memory closes them."""
        key = policy.timeout, policy.body_bytes, policy.trust_env, policy.session
        if key not in self._transports:
            self._transports[key] = Transport(policy)
        return self._transports[key]

    def take_over(self, endpoint: Endpoint, policy: FleetPolicy, model: str | None = None) -> None:
        """Let an endpoint go on with what an earlier fleet has learned about it, and remember it.

        Args:
            endpoint: The endpoint, not used yet.
            policy: The policy of its fleet.
            model: The model that its fleet asks, where the endpoint has no name of its own for it.
        """
        key = _identify(endpoint.spec, policy, model)
        if (earlier := self._endpoints.get(key)) is not None:
            endpoint.take_over(earlier)
        self._endpoints[key] = endpoint

    async def aclose(self) -> None:
        """Close the connections; fleets that are opened later open new ones."""
        transports, self._transports = list(self._transports.values()), {}
        for transport in transports:
            await transport.aclose()


def _identify(spec: EndpointSpec, policy: FleetPolicy, model: str | None) -> Hashable:
    """Return what two fleets must have in common to know the same about an endpoint."""
    where = identify_endpoint(spec.url), spec.model or model
    return *where, spec.max_in_flight, policy.limit, policy.breaker
