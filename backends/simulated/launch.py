"""Starts a simulated fleet as a child process and ends it again."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import orjson

from ..core.errors import ConfigurationError, SiteError
from .spec import SimulationSpec

MODULE: Final = "fanfold.backends.simulated"
_START_S: Final = 120.0
_STOP_S: Final = 5.0
_LINES: Final = 20
_LONGEST_LINE: Final = 16 * 1024 * 1024  # thousands of URLs stand in one line
_REFUSED: Final = 2


@dataclass(frozen=True, slots=True)
class LaunchedFleet:
    """A simulated fleet in a process of its own.

    Attributes:
        urls: Base URL of each node, ending in ``/v1``.
        control: URL of the control plane, without a path.
        model: The model served.
        pid: The process.
    """

    urls: tuple[str, ...]
    control: str
    model: str
    pid: int


@asynccontextmanager
async def launch(
    spec: SimulationSpec, start_timeout_s: float = _START_S
) -> AsyncIterator[LaunchedFleet]:
    """Run a simulated fleet in a child process.

    The child ends when its standard input does, hence with this process, however that ends.

    Args:
        spec: The fleet's specification.
        start_timeout_s: Longest wait for the child to listen, in seconds.

    Yields:
        Where the fleet is.

    Raises:
        ConfigurationError: The fleet refuses the specification, with its own words.
        SiteError: The child cannot be started, died at the start or did not get ready.
    """
    child, said = await _start(), deque[str](maxlen=_LINES)
    listening = asyncio.create_task(_collect(child, said))
    try:
        ready = await _ready(child, spec, start_timeout_s, said, listening)
        yield LaunchedFleet(
            tuple(ready["urls"]), str(ready["control"]), str(ready["model"]), child.pid
        )
    finally:
        await _stop(child)
        await listening


async def _start() -> Process:
    try:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", MODULE),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            limit=_LONGEST_LINE,
            start_new_session=True,  # Ctrl-C reaches the parent, which still needs the fleet
        )
    except OSError as error:
        raise SiteError(f"the simulated fleet's process cannot be started: {error}") from error


async def _collect(child: Process, said: deque[str]) -> None:
    if child.stderr is not None:
        async for line in child.stderr:
            said.append(line.decode(errors="replace").rstrip())


async def _ready(
    child: Process,
    spec: SimulationSpec,
    timeout_s: float,
    said: deque[str],
    listening: asyncio.Task[None],
) -> dict[str, Any]:
    """Hand over the specification and wait for the child's line."""
    try:
        async with asyncio.timeout(timeout_s):
            line = await _converse(child, spec)
            if line:
                return dict(orjson.loads(line))
            code = await child.wait()
            await listening
    except TimeoutError:
        raise SiteError(
            f"the simulated fleet was not ready after {timeout_s:g} s; its last words: "
            f"{' / '.join(said) or 'none'}"
        ) from None
    words = "\n".join(said) or "it said nothing"
    if code == _REFUSED:
        raise ConfigurationError(words)
    raise SiteError(f"the simulated fleet ended at its start with exit code {code}: {words}")


async def _converse(child: Process, spec: SimulationSpec) -> bytes:
    if child.stdin is None or child.stdout is None:
        raise SiteError("the simulated fleet's process has no pipes")
    child.stdin.write(spec.to_json().encode() + b"\n")
    try:
        await child.stdin.drain()
    except ConnectionError:
        return b""  # it died before it read; its exit code says why
    return await child.stdout.readline()


async def _stop(child: Process) -> None:
    """End the child: by the end of its input, and by force if that does not help."""
    if child.stdin is not None:
        child.stdin.close()
    try:
        async with asyncio.timeout(_STOP_S):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()
