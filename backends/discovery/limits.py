"""From the limits in the settings to the fleet's policies."""

from __future__ import annotations

from dataclasses import replace

from ...configs.models import LimitsConfig, RunConfig
from ..fleet.address import EndpointSpec
from ..fleet.policy import AffinityPolicy, FleetPolicy, HedgePolicy, LoadPolicy, PacePolicy
from .resolve import Place


def fleet_policy(config: RunConfig, place: Place | None = None) -> FleetPolicy:
    """Return how one process drives the fleet.

    Quotas hold for the run; where several workers share it, each gets its part.

    Args:
        config: The settings.
        place: Where the endpoints come from; a gateway has a quota of its own.
    """
    limits = config.limits
    policy = FleetPolicy.of(
        streams=limits.streams,
        attempts=limits.attempts,
        request_timeout_s=limits.request_timeout_s,
        fleet_wait_s=limits.fleet_wait_s,
    )
    return replace(
        policy,
        retry=replace(policy.retry, budget=limits.retry_budget),
        pace=_pace(config, place),
        hedge=HedgePolicy() if limits.hedge else None,
        affinity=AffinityPolicy(prefix=limits.affinity) if limits.affinity else None,
        load=LoadPolicy(source=limits.load) if limits.load else None,
        whole_answers=place is not None and place.gateway is not None,
        body_bytes=limits.body_bytes,
    )


def _pace(config: RunConfig, place: Place | None) -> PacePolicy:
    limits, share = config.limits, config.backend.concurrent_shards
    gateway = place.requests_per_s if place is not None else None
    rates = [rate for rate in (limits.requests_per_s, gateway) if rate is not None]
    return PacePolicy(
        requests_per_s=min(rates) / share if rates else None,
        tokens_per_min=limits.tokens_per_min / share if limits.tokens_per_min else None,
        # A gateway counts each second by itself: what was saved up would be refused.
        burst=1.0 if gateway is not None else None,
    )


def limited(limits: LimitsConfig, spec: EndpointSpec) -> EndpointSpec:
    """Return an endpoint with the limits that hold for each, unless it has its own."""
    return replace(
        spec,
        max_in_flight=spec.max_in_flight or limits.endpoint_streams,
        requests_per_s=spec.requests_per_s or limits.endpoint_requests_per_s,
        tokens_per_min=spec.tokens_per_min or limits.endpoint_tokens_per_min,
    )
