"""What a user sees while a run goes on."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ...backends.core.money import NANO
from ...backends.fleet.fleet import Fleet
from ...nodes.context import RunTools
from .open_run import OpenedRun

_PLAIN_S: Final = 10.0
_LIVE_S: Final = 0.25
_RATE_S: Final = 10.0
_WHOLE: Final = 10_000
"""Numbers below are shown as they are."""
_UNITS: Final = {"usd": "USD", "tokens": "tok", "requests": "req", "node_hours": "node-h"}
"""By limit of a budget."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of a line, in their order."""

    counts: str
    failed: str
    reused: str
    rate: str
    flow: str
    flying: str
    refused: str
    spent: str
    eta: str

    def line(self, mark: str, *, without: tuple[str, ...] = ()) -> str:
        names = (
            *("counts", "failed", "reused", "rate", "flow"),
            *("flying", "refused", "spent", "eta"),
        )
        shown = [getattr(self, name) for name in names if name not in without]
        return "  ".join(part for part in (mark, *shown) if part)


class Line:
    """Renders one line of progress; rates are over ten seconds."""

    def __init__(self, tools: RunTools) -> None:
        self._tools = tools
        self._seen = [(time.monotonic(), *self._so_far())]
        self._paused: float | None = None

    def __str__(self) -> str:
        """Return the line as it stands now, whole."""
        return self.within(sys.maxsize)

    def within(self, width: int) -> str:
        """Return the line as it stands now, in so many characters; what tells least goes first."""
        parts, simulated = self._parts(), self._tools.simulated
        tries: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("SIMULATED", ()),
            ("SIM", ()),
            ("SIMULATED", ("flow",)),
            ("SIM", ("flow",)),
            ("SIM", ("flow", "rate")),
            ("SIM", ("flow", "rate", "reused")),
        )
        lines = [parts.line(mark if simulated else "", without=out) for mark, out in tries]
        return next((line for line in lines if len(line) <= width), lines[-1][:width])

    def _parts(self) -> _Parts:
        progress, now = self._tools.progress, time.monotonic()
        fresh, tokens = self._so_far()
        self._seen.append((now, fresh, tokens))
        while len(self._seen) > 2 and now - self._seen[1][0] > _RATE_S:  # noqa: PLR2004 - a span has two ends
            del self._seen[0]
        then, items, spent = self._seen[0]
        seconds = max(now - then, 1e-9)
        rate, flow = (fresh - items) / seconds, (tokens - spent) / seconds
        left = progress.total - progress.done - progress.failed
        eta = f"{_duration(left / rate)} left" if rate > 0 and left else "…" if left else "done"
        fleet = self._tools.fleet if isinstance(self._tools, OpenedRun) else None
        refused = fleet.health().refusals if fleet is not None else 0
        pause = self._pause(fleet, now)
        return _Parts(
            counts=f"{short(progress.done)}/{short(progress.total)}",
            failed=f"{short(progress.failed)} failed",
            reused=f"{short(progress.reused)} reused" if progress.reused else "",
            rate="" if pause else f"{short(rate)}/s",
            flow="" if pause else f"{short(flow)} tok/s",
            flying=pause or self._flying(fleet),
            refused=f"{short(refused)} refused" if refused and not pause else "",
            spent=self._spent(),
            eta="" if pause else eta,
        )

    def _spent(self) -> str:
        """Return what is spent: of the cap that is nearest, or dollars if anything has a price."""
        progress, budget = self._tools.progress, self._tools.budget
        limits = {} if budget is None else budget.report()
        if limits:
            name = max(limits, key=lambda limit: limits[limit]["spent"] / limits[limit]["cap"])
            spent, cap = limits[name]["spent"], limits[name]["cap"]
            return f"{_amount(spent)}/{_amount(cap)} {_UNITS[name]}"
        nano = progress.nano_usd + progress.held.nano_usd
        return f"{_amount(nano / NANO)} USD" if nano else ""

    def _flying(self, fleet: Fleet | None) -> str:
        if (crew := self._tools.crew) is not None:
            return f"{short(crew.out)} shards out"
        if fleet is None:
            return f"{short(self._tools.gate.in_flight)} in flight"
        health = fleet.health()
        return f"{health.healthy}/{health.total} up  {short(health.in_flight)} in flight"

    def _pause(self, fleet: Fleet | None, now: float) -> str:
        """Return why nothing goes on, since when and for how long at most; or nothing."""
        health = fleet.health() if fleet is not None else None
        if fleet is None or health is None or health.healthy or health.paused is None:
            self._paused = None
            return ""
        self._paused = now if self._paused is None else self._paused
        waited, most = _duration(now - self._paused), _duration(fleet.policy.timeout.fleet_s)
        return f"NO ENDPOINT ALIVE 0/{health.total}: waiting {waited} of {most}"

    def _so_far(self) -> tuple[int, int]:
        progress = self._tools.progress
        tokens = progress.prompt_tokens + progress.completion_tokens
        return progress.done + progress.failed - progress.before, tokens


def short(number: float) -> str:
    """Return a number in five characters at most, large ones with a unit: ``143k``, ``1.2M``."""
    if round(number) < _WHOLE:
        return f"{number:,.0f}"
    scaled, units = number / 1000, "kMGT"
    while round(scaled) >= 1000 and len(units) > 1:  # noqa: PLR2004 - the next unit
        scaled, units = scaled / 1000, units[1:]
    digits = 1 if scaled < 9.95 else 0  # noqa: PLR2004 - 9.95 is 10 when rounded
    return f"{scaled:.{digits}f}{units[0]}"


def _amount(value: float) -> str:
    """Return an amount in five or six characters: small ones with digits behind the point."""
    if value >= 1000 or value == int(value):  # noqa: PLR2004 - larger ones are whole
        return short(value)
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"  # noqa: PLR2004 - a cent


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}" if hours else f"{minutes}:{rest:02}"


@asynccontextmanager
async def watching(tools: RunTools, console: Console, quiet: bool) -> AsyncIterator[None]:
    """Show progress while the block runs: live on a terminal, else a line every 10 s."""
    if quiet:
        yield
        return
    show = _live if console.is_terminal else _plain
    task = asyncio.create_task(show(Line(tools), console))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _live(line: Line, console: Console) -> None:
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(Text(line.within(console.width)), refresh=True)
                await asyncio.sleep(_LIVE_S)
        finally:
            live.update(Text(line.within(console.width)), refresh=True)


async def _plain(line: Line, console: Console) -> None:
    try:
        while True:
            await asyncio.sleep(_PLAIN_S)
            console.print(str(line), highlight=False, markup=False, soft_wrap=True)
    finally:
        console.print(str(line), highlight=False, markup=False, soft_wrap=True)
