"""Prometheus metrics of a run, on loopback and on request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from ...backends.core.errors import ConfigurationError
from ...backends.core.money import HOUR_MS, NANO
from ...backends.fleet.stats import EndpointReport, FleetHealth
from ...configs.resolve import check_metrics
from .open_run import OpenedRun

_HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A run at one moment, so that it can be rendered off the loop."""

    items: dict[str, int]
    tokens: dict[str, int]
    usd: float | None
    node_hours: dict[str, float]
    health: FleetHealth | None
    endpoints: Sequence[EndpointReport]


@asynccontextmanager
async def exposed(tools: OpenedRun, port: int | None) -> AsyncIterator[None]:
    """Serve ``/metrics`` on loopback while the block runs.

    Args:
        tools: The run.
        port: The port, or None to serve nothing.

    Raises:
        MissingExtraError: prometheus_client is not installed.
        ConfigurationError: The port is taken.
    """
    if port is None:
        yield
        return
    check_metrics()

    async def answer(_: web.Request) -> web.Response:
        text = await asyncio.to_thread(_rendered, _snapshot(tools))
        return web.Response(body=text, headers={"Content-Type": _content_type()})

    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await _listen(runner, port)
        yield
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, port: int) -> None:
    try:
        await web.TCPSite(runner, _HOST, port).start()
    except OSError as error:
        msg = f"metrics.port (--metrics-port) {port}: cannot listen there: {error.strerror}"
        raise ConfigurationError(msg) from None


def _snapshot(tools: OpenedRun) -> _Snapshot:
    progress, fleet, held = tools.progress, tools.fleet, tools.progress.held
    left = progress.total - progress.done - progress.failed
    return _Snapshot(
        {"done": progress.done, "failed": progress.failed, "open": left},
        {"useful": progress.useful_tokens, "wasted": progress.wasted_tokens},
        (progress.nano_usd + held.nano_usd) / NANO if tools.priced or held.nano_usd else None,
        {
            "busy": (held.node_ms - held.idle_ms) / HOUR_MS,
            "idle": held.idle_ms / HOUR_MS,
        },
        fleet.health() if fleet is not None else None,
        fleet.report() if fleet is not None else (),
    )


def _content_type() -> str:
    from prometheus_client import CONTENT_TYPE_LATEST  # noqa: PLC0415 - an extra

    return CONTENT_TYPE_LATEST


def _rendered(snapshot: _Snapshot) -> bytes:
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415 - an extra

    class Collector:
        def collect(self) -> Iterator[Any]:
            yield from _families(snapshot)

    registry = CollectorRegistry()
    registry.register(Collector())
    return generate_latest(registry)


def _families(snapshot: _Snapshot) -> Iterator[Any]:
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415 - an extra

    items = GaugeMetricFamily("fanfold_items", "Items of the run.", labels=["status"])
    for status, count in snapshot.items.items():
        items.add_metric([status], count)
    yield items
    yield from _of_cost(snapshot)
    if snapshot.health is not None:
        yield from _of_fleet(snapshot.health)
        yield from _of_endpoints(snapshot.endpoints)


def _of_cost(snapshot: _Snapshot) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415 - an extra

    tokens = CounterMetricFamily(
        "fanfold_tokens", "Tokens of items that ended, over all lives.", labels=["kind"]
    )
    for kind, count in snapshot.tokens.items():
        tokens.add_metric([kind], count)
    hours = CounterMetricFamily(
        "fanfold_node_hours", "Node-hours held, over all lives.", labels=["kind"]
    )
    for kind, value in snapshot.node_hours.items():
        hours.add_metric([kind], value)
    yield from (tokens, hours)
    if snapshot.usd is not None:
        yield CounterMetricFamily("fanfold_usd", "US dollars, over all lives.", value=snapshot.usd)


def _of_fleet(health: FleetHealth) -> Iterator[Any]:
    from prometheus_client.core import (  # noqa: PLC0415 - an extra
        CounterMetricFamily,
        GaugeMetricFamily,
    )

    gauges = {
        "endpoints_healthy": ("Endpoints in use.", health.healthy),
        "endpoints_known": ("All endpoints.", health.total),
        "requests_in_flight": ("Requests in flight.", health.in_flight),
        "calls_waiting": ("Calls that wait for an endpoint.", health.waiting),
        "paused": ("Whether no endpoint is alive.", int(health.paused is not None)),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"fanfold_{name}", text, value=value)
    yield CounterMetricFamily("fanfold_refusals", "Refusals so far.", value=health.refusals)


def _of_endpoints(reports: Sequence[EndpointReport]) -> Iterator[Any]:
    from prometheus_client.core import (  # noqa: PLC0415 - an extra
        CounterMetricFamily,
        GaugeMetricFamily,
    )

    calls = CounterMetricFamily(
        "fanfold_endpoint_calls", "Requests that ended.", labels=["endpoint"]
    )
    failures = CounterMetricFamily(
        "fanfold_endpoint_failures", "Failed ones by class.", labels=["endpoint", "class"]
    )
    tokens = CounterMetricFamily(
        "fanfold_endpoint_tokens",
        "Tokens as reported, and lost ones at most.",
        labels=["endpoint", "kind"],
    )
    opened = CounterMetricFamily(
        "fanfold_endpoint_opened", "Times that it was left alone.", labels=["endpoint"]
    )
    flying = GaugeMetricFamily(
        "fanfold_endpoint_in_flight", "Requests in flight.", labels=["endpoint"]
    )
    latency = GaugeMetricFamily(
        "fanfold_endpoint_latency_seconds", "Time to an answer.", labels=["endpoint", "quantile"]
    )
    for r in reports:
        calls.add_metric([r.endpoint], r.calls)
        opened.add_metric([r.endpoint], r.opened)
        flying.add_metric([r.endpoint], r.in_flight)
        tokens.add_metric([r.endpoint, "prompt"], r.prompt_tokens)
        tokens.add_metric([r.endpoint, "completion"], r.completion_tokens)
        tokens.add_metric([r.endpoint, "lost"], r.lost_prompt_tokens + r.lost_completion_tokens)
        for name, count in r.failures.items():
            failures.add_metric([r.endpoint, name], count)
        for share, seconds in _quantiles(r):
            if seconds is not None:
                latency.add_metric([r.endpoint, share], seconds)
    yield from (calls, failures, tokens, opened, flying, latency)


def _quantiles(report: EndpointReport) -> tuple[tuple[str, float | None], ...]:
    return (
        ("0.5", report.latency_p50_s),
        ("0.9", report.latency_p90_s),
        ("0.99", report.latency_p99_s),
    )
