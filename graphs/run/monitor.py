"""Progress of a run in a terminal or as lines, and Prometheus metrics."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ...backends.batch.transport import BatchProgress
from ...backends.core.errors import ConfigurationError
from ...backends.core.money import MS_PER_HOUR, NANO_PER_USD
from ...backends.core.silence import SILENT_S, name_endpoints
from ...backends.fleet.fleet import Fleet
from ...backends.fleet.stats import EndpointReport, FleetHealth
from ...configs.resolve import check_metrics
from .accounting import OpenRun
from .console import fill_lines, format_count

_PLAIN_S: Final = 10.0
_LIVE_S: Final = 0.25
_RATE_S: Final = 10.0
_UNITS: Final = {"usd": "USD", "tokens": "tok", "requests": "req", "node_hours": "node-h"}
"""Unit of each budget limit."""


_FEW: Final = 20
"""Items in the time of a rate, below which it says little about the time left."""
_SLOW: Final = 0.95
"""Share of the items that end sooner than the last one, as it is estimated."""

_BLANK: Final = "  "
"""Between the parts of a line."""

_LEAST_BAR: Final = 10
"""Characters below which a bar is left out."""

_MOST_CLASSES: Final = 6
"""Error classes that the progress names; ``fanfold failures`` has all."""


@dataclass(frozen=True, slots=True)
class _LineParts:
    """The parts of a progress line, in order."""

    counts: str
    failed: str
    reused: str
    rate: str
    flow: str
    flying: str
    refused: str
    silent: str
    spent: str
    eta: str

    def join(self, mark: str) -> str:
        names = (
            *("counts", "failed", "reused", "rate", "flow"),
            *("flying", "refused", "silent", "spent", "eta"),
        )
        return _BLANK.join(part for part in (mark, *(getattr(self, n) for n in names)) if part)

    def below(self) -> list[str]:
        """Return the parts shown below a bar, which has the counts."""
        parts = (
            self.rate,
            self.eta,
            self.flying,
            self.refused,
            self.silent,
            self.spent,
            self.flow,
            self.reused,
        )
        return [part for part in parts if part]


class ProgressLine:
    """Progress of a run, as one line or as a bar with lines below it.

    Rates are averages over ten seconds.
    """

    def __init__(self, tools: OpenRun) -> None:
        self._tools = tools
        self._seen = [(time.monotonic(), *self._new_counts())]
        self._paused: float | None = None

    def __str__(self) -> str:
        """Return the current state as one line, however long."""
        return self._parts().join(self._mark())

    def render(self, width: int) -> RenderableType:
        """Return a bar with lines below it; no line is longer than the terminal is wide."""
        progress = self._tools.progress
        ended, total = progress.done + progress.failed, progress.total
        parts = self._parts()
        mark = f"{mark}{_BLANK}" if (mark := self._mark()) else ""
        percent = 100 * ended // total if total else 100  # 100 % only if all have ended
        counts = f"{_BLANK}{percent:3} %{_BLANK}{format_count(ended)}/{format_count(total)}"
        room = width - len(mark) - len(counts)
        row = Table.grid()
        if room >= _LEAST_BAR:
            bar = ProgressBar(max(1, total), ended if total else 1, width=room)
            row.add_row(Text(mark), bar, Text(counts))
        else:
            row.add_row(Text(f"{mark}{counts.strip()}"))
        lines = [*fill_lines(parts.below(), width), *self._failures(width)]
        return Group(row, *(Text(line, no_wrap=len(line) <= width) for line in lines))

    def _mark(self) -> str:
        """Return the stage of a pipeline, and whether the answers are simulated."""
        marks = [self._tools.stage, "SIMULATED" if self._tools.simulated else ""]
        return _BLANK.join(filter(None, marks))

    def _failures(self, width: int) -> list[str]:
        """Return how many items failed, by error class."""
        if not (failed := self._tools.progress.failed):
            return []
        classes = list(self._tools.item_journal.count_failures().items())
        shown = [f"{format_count(count)} {name}" for name, count in classes[:_MOST_CLASSES]]
        if rest := sum(count for _, count in classes[_MOST_CLASSES:]):
            shown.append(f"{format_count(rest)} of other classes")
        return fill_lines([f"{format_count(failed)} failed:", *shown], width)

    def _parts(self) -> _LineParts:
        progress, now = self._tools.progress, time.monotonic()
        finished, tokens = self._new_counts()
        self._seen.append((now, finished, tokens))
        while len(self._seen) > 2 and now - self._seen[1][0] > _RATE_S:  # noqa: PLR2004 - an interval has two ends
            del self._seen[0]
        start, items, spent = self._seen[0]
        seconds = max(now - start, 1e-9)
        rate, flow = (finished - items) / seconds, (tokens - spent) / seconds
        left = progress.total - progress.done - progress.failed
        left_s = self._estimate_left(left, finished - items, rate)
        eta = "done" if not left else "…" if left_s is None else f"{_duration(left_s)} left"
        fleet = self._tools.fleet
        refused = fleet.health().refusals if fleet is not None else 0
        pause = self._pause(fleet, now)
        return _LineParts(
            counts=f"{format_count(progress.done)}/{format_count(progress.total)}",
            failed=f"{format_count(progress.failed)} failed",
            reused=f"{format_count(progress.usage.reused)} reused" if progress.usage.reused else "",
            rate="" if pause else f"{format_count(rate)}/s",
            flow="" if pause else f"{format_count(flow)} tok/s",
            flying=pause or self._in_flight(fleet),
            refused=f"{format_count(refused)} refused" if refused and not pause else "",
            silent=self._silent(),
            spent=self._spent(),
            eta="" if pause else eta,
        )

    def _estimate_left(self, left: int, ended: int, rate: float) -> float | None:
        """Return the seconds until the last item ends; None if unknown.

        Where few items end in the time over which rates are measured, because answers are long, the
        times of the latest items say more.

        Args:
            left: Items that have not ended.
            ended: Items that ended in that time.
            rate: Items per second.
        """
        times, gate = self._tools.progress.times, self._tools.gate
        mean_s, longest_s = times.mean_s, times.quantile_s(_SLOW)
        is_local = self._tools.coordinator is None and self._tools.batches is None
        if ended < _FEW and is_local and gate.in_flight and mean_s and longest_s:
            waiting = max(0, left - gate.in_flight)
            running_s = 0.0 if waiting else time.monotonic() - gate.started_at
            return waiting * mean_s / gate.in_flight + max(0.0, longest_s - running_s)
        return left / rate if rate > 0 else None

    def _silent(self) -> str:
        """Return which endpoints have answered nothing for ten minutes of work, by name."""
        silent = self._tools.silence.find_silent()
        return f"no answer for {_duration(SILENT_S)}: {name_endpoints(silent)}" if silent else ""

    def _spent(self) -> str:
        """Return the amount spent: of the tightest limit, or dollars if there is a price."""
        progress, budget = self._tools.progress, self._tools.budget
        limits = {} if budget is None else budget.report()
        if limits:
            name = max(limits, key=lambda limit: _share(limits[limit]))
            spent, cap = limits[name]["spent"], limits[name]["cap"]
            return f"{_amount(spent)}/{_amount(cap)} {_UNITS[name]}"
        nano = progress.usage.nano_usd + progress.node_time.nano_usd
        return f"{_amount(nano / NANO_PER_USD)} USD" if nano else ""

    def _in_flight(self, fleet: Fleet | None) -> str:
        if self._tools.batches is not None:
            return _describe_batches(self._tools.batches.report())
        if (coordinator := self._tools.coordinator) is not None:
            return f"{format_count(coordinator.in_flight)} shards out"
        if fleet is None:
            return f"{format_count(self._tools.gate.in_flight)} in flight"
        health = fleet.health()
        return f"{health.healthy}/{health.total} up  {format_count(health.in_flight)} in flight"

    def _pause(self, fleet: Fleet | None, now: float) -> str:
        """Return why the run is paused, with the elapsed and maximum time, or an empty text."""
        health = fleet.health() if fleet is not None else None
        if fleet is None or health is None or health.healthy or health.paused is None:
            self._paused = None
            return ""
        self._paused = now if self._paused is None else self._paused
        waited, most = _duration(now - self._paused), _duration(fleet.policy.timeout.fleet_s)
        return f"NO ENDPOINT ALIVE 0/{health.total}: waiting {waited} of {most}"

    def _new_counts(self) -> tuple[int, int]:
        progress = self._tools.progress
        tokens = progress.usage.prompt_tokens + progress.usage.completion_tokens
        return progress.done + progress.failed - progress.ended_before, tokens


def _describe_batches(report: BatchProgress) -> str:
    """Return what happens to the batches in work, and how many requests wait for one."""
    parts = [
        f"batch {number} {state} {_duration(seconds)}, {format_count(lines)} requests"
        for number, lines, state, seconds in report.batches
    ]
    if report.waiting or not parts:
        parts.append(f"{format_count(report.waiting)} requests wait")
    return "  ".join(parts)


def _amount(value: float) -> str:
    """Return an amount in five or six characters, with decimals if small."""
    if value >= 1000 or value == int(value):  # noqa: PLR2004 - larger ones have no decimals
        return format_count(value)
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"  # noqa: PLR2004 - a cent


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}" if hours else f"{minutes}:{rest:02}"


@asynccontextmanager
async def show_progress(tools: OpenRun, console: Console, quiet: bool) -> AsyncIterator[None]:
    """Show progress while the block runs: a bar on a terminal, else a line every 10 s."""
    if quiet:
        yield
        return
    show = _show_live if console.is_terminal and not console.is_dumb_terminal else _print_lines
    task = asyncio.create_task(show(ProgressLine(tools), console))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _show_live(line: ProgressLine, console: Console) -> None:
    """Show a bar below everything else that is printed.

    Standard output that goes elsewhere is not diverted to the terminal.
    """
    live = Live(console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
    with live:
        try:
            while True:
                live.update(line.render(console.width), refresh=True)
                await asyncio.sleep(_LIVE_S)
        finally:
            live.update(line.render(console.width), refresh=True)


async def _print_lines(line: ProgressLine, console: Console) -> None:
    try:
        while True:
            await asyncio.sleep(_PLAIN_S)
            console.print(str(line), highlight=False, markup=False, soft_wrap=True)
    finally:
        console.print(str(line), highlight=False, markup=False, soft_wrap=True)


_HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The metrics of a run at one moment, which a thread can render."""

    items: dict[str, int]
    tokens: dict[str, int]
    usd: float | None
    node_hours: dict[str, float]
    health: FleetHealth | None
    endpoints: Sequence[EndpointReport]


@asynccontextmanager
async def serve_metrics(tools: OpenRun, port: int | None) -> AsyncIterator[None]:
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
    from aiohttp import web  # noqa: PLC0415 - slow to import, and few runs serve metrics

    async def answer(_: web.Request) -> web.Response:
        text = await asyncio.to_thread(_render_metrics, _snapshot(tools))
        return web.Response(body=text, headers={"Content-Type": _content_type()})

    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, _HOST, port).start()
        except OSError as error:
            msg = f"metrics.port (--metrics-port) {port}: cannot listen there: {error.strerror}"
            raise ConfigurationError(msg) from None
        yield
    finally:
        await runner.cleanup()


def _snapshot(tools: OpenRun) -> _Snapshot:
    progress, fleet, held = tools.progress, tools.fleet, tools.progress.node_time
    left = progress.total - progress.done - progress.failed
    return _Snapshot(
        {"done": progress.done, "failed": progress.failed, "open": left},
        {"useful": progress.usage.useful_tokens, "wasted": progress.usage.wasted_tokens},
        (progress.usage.nano_usd + held.nano_usd) / NANO_PER_USD
        if tools.is_priced or held.nano_usd
        else None,
        {
            "busy": (held.node_ms - held.idle_ms) / MS_PER_HOUR,
            "idle": held.idle_ms / MS_PER_HOUR,
        },
        fleet.health() if fleet is not None else None,
        fleet.report() if fleet is not None else (),
    )


def _content_type() -> str:
    from prometheus_client import CONTENT_TYPE_LATEST  # noqa: PLC0415 - an extra

    return CONTENT_TYPE_LATEST


def _render_metrics(snapshot: _Snapshot) -> bytes:
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
    yield from _cost_metrics(snapshot)
    if snapshot.health is not None:
        yield from _fleet_metrics(snapshot.health)
        yield from _endpoint_metrics(snapshot.endpoints)


def _cost_metrics(snapshot: _Snapshot) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415 - an extra

    tokens = CounterMetricFamily(
        "fanfold_tokens", "Tokens of finished items, over all sessions.", labels=["kind"]
    )
    for kind, count in snapshot.tokens.items():
        tokens.add_metric([kind], count)
    hours = CounterMetricFamily(
        "fanfold_node_hours", "Node-hours held, over all sessions.", labels=["kind"]
    )
    for kind, value in snapshot.node_hours.items():
        hours.add_metric([kind], value)
    yield from (tokens, hours)
    if snapshot.usd is not None:
        yield CounterMetricFamily(
            "fanfold_usd", "US dollars, over all sessions.", value=snapshot.usd
        )


def _fleet_metrics(health: FleetHealth) -> Iterator[Any]:
    from prometheus_client.core import (  # noqa: PLC0415 - an extra
        CounterMetricFamily,
        GaugeMetricFamily,
    )

    gauges = {
        "endpoints_healthy": ("Endpoints in use.", health.healthy),
        "endpoints_known": ("All endpoints.", health.total),
        "requests_in_flight": ("Requests in flight.", health.in_flight),
        "calls_waiting": ("Calls waiting for an endpoint.", health.waiting),
        "paused": ("1 if no endpoint is available.", int(health.paused is not None)),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"fanfold_{name}", text, value=value)
    yield CounterMetricFamily("fanfold_refusals", "Refusals so far.", value=health.refusals)


def _endpoint_metrics(reports: Sequence[EndpointReport]) -> Iterator[Any]:
    from prometheus_client.core import (  # noqa: PLC0415 - an extra
        CounterMetricFamily,
        GaugeMetricFamily,
    )

    calls = CounterMetricFamily("fanfold_endpoint_calls", "Finished requests.", labels=["endpoint"])
    failures = CounterMetricFamily(
        "fanfold_endpoint_failures", "Failed requests by error class.", labels=["endpoint", "class"]
    )
    tokens = CounterMetricFamily(
        "fanfold_endpoint_tokens",
        "Reported tokens, and the upper bound of lost ones.",
        labels=["endpoint", "kind"],
    )
    opened = CounterMetricFamily(
        "fanfold_endpoint_opened",
        "Times that the endpoint was marked unhealthy.",
        labels=["endpoint"],
    )
    flying = GaugeMetricFamily(
        "fanfold_endpoint_in_flight", "Requests in flight.", labels=["endpoint"]
    )
    latency = GaugeMetricFamily(
        "fanfold_endpoint_latency_seconds", "Time to the answer.", labels=["endpoint", "quantile"]
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


def _share(limit: Mapping[str, Any]) -> float:
    """Return the share of a limit that is spent; all of one that later stages need as a whole."""
    return float(limit["spent"] / limit["cap"]) if limit["cap"] else 1.0
