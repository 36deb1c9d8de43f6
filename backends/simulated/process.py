"""The fleet as a process of its own that ends with its parent."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import orjson

from ..core.errors import ConfigurationError
from ..core.process import raise_file_limit
from .fleet import SimulatedFleet
from .spec import SimulationSpec

PROTOCOL: Final = 1
"""Version of the line that the child prints."""
_ORPHAN_CHECK_S: Final = 1.0
_FAILED: Final = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a fleet until its parent is gone, or until SIGTERM.

    Without options the specification is the first line of standard input, as JSON; the fleet
    then ends as soon as standard input does. With options it ends on SIGINT or SIGTERM only.
    One line of JSON is printed when all sockets listen:
    ``{"v": 1, "urls": [...], "control": "http://...", "model": "..."}``.

    Args:
        arguments: The command line, or None for the process's own.

    Returns:
        The exit code: 0, or 2 when the fleet cannot start.
    """
    options = _parser().parse_args(arguments)
    try:
        spec = _from_options(options)
        watched = spec is None
        if spec is None:
            spec = SimulationSpec.from_json(sys.stdin.buffer.readline() or b"{}")
        asyncio.run(serve(spec, watched))
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        return _FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fanfold.backends.simulated",
        description="Serve a simulated fleet. Without options the specification is read as one "
        "line of JSON from standard input, and the fleet ends when standard input does.",
    )
    parser.add_argument("--spec", help="the specification, a JSON object")
    parser.add_argument("--nodes", type=int, help="how many nodes")
    parser.add_argument("--port", type=int, help="first port; 0 for a free one")
    parser.add_argument("--addressing", help="path, port or addr")
    parser.add_argument("--model", help="name of the model served")
    parser.add_argument("--responder", help="who writes the answers: schema or esol")
    return parser


def _from_options(options: argparse.Namespace) -> SimulationSpec | None:
    """Return the specification that the options give, or None where there are none."""
    given: dict[str, Any] = {k: v for k, v in vars(options).items() if v is not None}
    if not given:
        return None
    spec = SimulationSpec.from_json(given.pop("spec", "{}"))
    return replace(spec, **given)


async def serve(spec: SimulationSpec, watched: bool) -> None:
    """Serve a fleet until told to stop.

    Args:
        spec: The fleet's specification.
        watched: Whether the end of standard input, or of the parent process, is such a sign.

    Raises:
        ConfigurationError: The fleet cannot start.
    """
    parent = os.getppid()  # before it is told that all is ready: it may end right then
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with SimulatedFleet(spec) as fleet, asyncio.TaskGroup() as tasks:
        signs = (_stdin_ends(), _orphaned(parent)) if watched else ()
        watchers = [tasks.create_task(sign) for sign in signs]
        for task in watchers:
            task.add_done_callback(lambda _: stop.set())
        _announce(fleet)
        await stop.wait()
        for task in watchers:
            task.cancel()


def _announce(fleet: SimulatedFleet) -> None:
    line = {
        "v": PROTOCOL,
        "urls": fleet.urls,
        "control": fleet.base_url,
        "model": fleet.spec.model,
        "open_files": raise_file_limit(),
    }
    sys.stdout.write(orjson.dumps(line).decode() + "\n")
    sys.stdout.flush()


async def _stdin_ends() -> None:
    """Return when standard input is at its end: the parent closed it, or died."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    try:
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    except ValueError as error:
        raise ConfigurationError(
            "standard input must be a pipe, a socket or a terminal; use --spec to run without"
        ) from error
    while await reader.read(1024):
        pass


async def _orphaned(parent: int) -> None:
    """Return when the parent is gone; a process that it forked may still hold the pipe."""
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing tells of a parent's death
        await asyncio.sleep(_ORPHAN_CHECK_S)
