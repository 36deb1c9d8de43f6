from __future__ import annotations

from typing import Any

import pytest

from fanfold.backends.discovery.connect import (
    apply_limits,
    find_rate_limits,
    make_fleet_policy,
)
from fanfold.backends.discovery.resolve import make_gateway_set
from fanfold.backends.fleet.endpoint import DeploymentState, EndpointSpec
from fanfold.backends.fleet.policy import FleetPolicy, RateLimitPolicy
from fanfold.configs.loader import load_config
from fanfold.configs.models import RunConfig


def config(*limits: str, **sections: Any) -> RunConfig:
    settings = {"task": {"prompt": "x"}, "endpoints": "auto", **sections}
    return load_config(settings, [f"limits.{limit}" for limit in limits]).config


def test_by_default_there_is_no_quota() -> None:
    policy = make_fleet_policy(config())
    assert (policy.rate_limit, policy.retry.budget) == (RateLimitPolicy(), None)
    assert (policy.affinity, policy.load, policy.whole_answers) == (None, None, False)
    assert policy.hedge == FleetPolicy().hedge


def test_every_limit_reaches_the_fleet() -> None:
    policy = make_fleet_policy(
        config("hedge=false", "retry_budget=0.2", "affinity=100", "load=load", "fleet_wait_s=7")
    )
    assert policy.hedge is None
    assert policy.retry.budget == 0.2
    assert policy.affinity is not None
    assert policy.affinity.prefix == 100
    assert policy.load is not None
    assert policy.load.source == "load"
    assert policy.timeout.fleet_s == 7


def test_workers_share_a_quota() -> None:
    backend = {"kind": "local", "processes": 4}
    policy = make_fleet_policy(config("requests_per_s=8", "tokens_per_min=100", backend=backend))
    assert (policy.rate_limit.requests_per_s, policy.rate_limit.tokens_per_min) == (8, 100)
    assert policy.rate_limit.share == 0.25


@pytest.mark.parametrize(("own", "rate"), [(None, 8.0), (3.0, 3.0), (20.0, 8.0)])
def test_a_gateways_quota_holds_too(own: float | None, rate: float) -> None:
    first = {"paths": ["a/b"], "token": "t"}
    given = config(f"requests_per_s={own or 'null'}", endpoints={"first": first})
    assert given.endpoints.first is not None
    policy = make_fleet_policy(given, make_gateway_set(given.endpoints.first, None))
    assert policy.rate_limit == RateLimitPolicy(requests_per_s=rate)
    assert policy.whole_answers


@pytest.mark.parametrize(("own", "tokens"), [({}, 60_000), ({"tokens_per_min": 5}, 5)])
def test_a_gateways_tokens_are_limited_by_default(own: dict[str, Any], tokens: float) -> None:
    first = {"paths": ["a/b", "c/d"], "token": "t", "window_s": 6, **own}
    given = config(endpoints={"first": first})
    assert given.endpoints.first is not None
    specs = make_gateway_set(given.endpoints.first, None).specs
    assert [(spec.tokens_per_min, spec.window_s) for spec in specs] == [(tokens, 6.0)] * 2


def test_an_endpoints_own_limits_count_more() -> None:
    limits = config("endpoint_streams=5", "endpoint_requests_per_s=2").limits
    spec = apply_limits(limits, EndpointSpec("http://h:1", max_in_flight=9))
    assert (spec.max_in_flight, spec.requests_per_s, spec.tokens_per_min) == (9, 2, None)


def test_the_limits_that_hold_together_are_the_lowest() -> None:
    def spec(host: str, state: DeploymentState | None = None) -> EndpointSpec:
        return EndpointSpec(f"http://{host}:1", tokens_per_min=600.0, window_s=6.0, state=state)

    given = config("requests_per_s=50", "endpoint_requests_per_s=20")
    policy = make_fleet_policy(given).rate_limit
    two = [spec("a"), spec("b", DeploymentState.RUNNING), spec("c", DeploymentState.COLD)]
    assert find_rate_limits(policy, given.limits, two) == (40.0, 12_000.0)
    assert find_rate_limits(policy, given.limits, two[2:]) == (20.0, 6_000.0)
    unlimited = [EndpointSpec("http://a:1"), spec("b")]
    assert find_rate_limits(policy, given.limits, unlimited) == (40.0, None)
    assert find_rate_limits(RateLimitPolicy(), config().limits, ()) == (None, None)
