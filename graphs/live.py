"""What a user sees while a run goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..nodes.context import RunTools

_PLAIN_S: Final = 10.0
_LIVE_S: Final = 0.25
_RATE_S: Final = 10.0


class Line:
    """Renders one line of progress; rates are over the last ten seconds."""

    def __init__(self, tools: RunTools) -> None:
        self._tools = tools
        self._seen = [(time.monotonic(), *self._so_far())]

    def __str__(self) -> str:
        """Return the line as it stands now."""
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
        simulated = "SIMULATED  " if self._tools.simulated else ""
        return (
            f"{simulated}{progress.done:,} done  {progress.failed:,} failed  of {progress.total:,}"
            f"  {rate:,.0f} items/s  {flow:,.0f} tokens/s  "
            f"{self._tools.gate.in_flight:,} in flight  {eta}"
        )

    def _so_far(self) -> tuple[int, int]:
        progress = self._tools.progress
        tokens = progress.prompt_tokens + progress.completion_tokens
        return progress.done + progress.failed - progress.before, tokens


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes}:{rest:02}"


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
                live.update(Text(str(line)), refresh=True)
                await asyncio.sleep(_LIVE_S)
        finally:
            live.update(Text(str(line)), refresh=True)


async def _plain(line: Line, console: Console) -> None:
    try:
        while True:
            await asyncio.sleep(_PLAIN_S)
            console.print(str(line), highlight=False, markup=False, soft_wrap=True)
    finally:
        console.print(str(line), highlight=False, markup=False, soft_wrap=True)
