"""Each call is reported once, and the reports add up to what happened."""

from __future__ import annotations

import orjson

from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.endpoint import Endpoint, EndpointSpec
from fanfold.backends.fleet.fleet import StatsCollector, StatsReporter


def test_news_of_two_workers_add_up() -> None:
    gathered, whole = StatsCollector(), Endpoint(EndpointSpec("http://n1:1"))
    for worker in range(2):
        endpoint, idle = (
            Endpoint(EndpointSpec("http://n1:1")),
            Endpoint(EndpointSpec("http://n2:1")),
        )
        teller = StatsReporter(lambda both=(endpoint, idle): both)  # type: ignore[misc]
        for seconds in (0.5, 2.0 + worker, 8.0):
            for one in (endpoint, whole):
                one.stats.add_answer(seconds, Usage(7, 3))
                one.stats.add_failure("EndpointBusyError")
            gathered.add(orjson.loads(orjson.dumps(teller.delta())))
            assert teller.delta() == []
    (row,) = gathered.reports()
    report = whole.report()
    for name in ("endpoint", "state", "calls", "failures", "prompt_tokens", "completion_tokens"):
        assert row[name] == getattr(report, name)
    for name in ("latency_p50_s", "latency_p90_s", "latency_p99_s"):
        assert row[name] == getattr(report, name) is not None
