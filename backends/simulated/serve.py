"""Serve a simulated fleet until a stop signal: ``python -m fanfold.backends.simulated``."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

import orjson

from ..core.errors import ConfigurationError
from ..core.process import raise_file_limit
from .fleet import SimulatedFleet
from .spec import REFUSED, SimulationSpec

PROTOCOL: Final = 1
"""Version of the line that the child prints."""
_ORPHAN_CHECK_S: Final = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a fleet until its parent exits, or until SIGTERM.

    Without options the specification is the first line of standard input, as JSON; the fleet
    then stops when standard input closes. With options it stops on SIGINT or SIGTERM only.
    One line of JSON is printed when all sockets listen:
    ``{"v": 1, "urls": [...], "control": "http://...", "model": "..."}``.

    Args:
        arguments: The command line, or None for that of the process.

    Returns:
        The exit code: 0, or 2 when the fleet cannot start.
    """
    options = _parser().parse_args(arguments)
    try:
        spec = _from_options(options)
        watched = spec is None
        if spec is None:
            spec = SimulationSpec.from_json(sys.stdin.buffer.readline() or b"{}")
        asyncio.run(serve_fleet(spec, _announce, watched))
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fanfold.backends.simulated",
        description="Serve a simulated fleet. Without options, read the specification as one "
        "line of JSON from standard input, and stop when standard input closes.",
    )
    parser.add_argument("--spec", help="the specification, a JSON object")
    parser.add_argument("--nodes", type=int, help="number of nodes")
    parser.add_argument("--port", type=int, help="first port; 0 for a free one")
    parser.add_argument("--addressing", help="path, port or addr")
    parser.add_argument("--model", help="name of the served model")
    parser.add_argument(
        "--responder", help="what computes the answers: schema, labels, esol or agent"
    )
    return parser


def _from_options(options: argparse.Namespace) -> SimulationSpec | None:
    """Return the specification given by the options, or None without options."""
    given: dict[str, Any] = {k: v for k, v in vars(options).items() if v is not None}
    if not given:
        return None
    spec = SimulationSpec.from_json(given.pop("spec", "{}"))
    return replace(spec, **given)


async def serve_fleet(
    spec: SimulationSpec,
    announce: Callable[[SimulatedFleet], None],
    ends_with_parent: bool = False,
) -> None:
    """Serve a fleet until SIGINT or SIGTERM.

    Args:
        spec: The fleet's specification.
        announce: Called when all sockets listen.
        ends_with_parent: Whether to stop also at the end of standard input or of the parent.

    Raises:
        ConfigurationError: The fleet cannot start.
    """
    parent = os.getppid()  # read before the announcement: the parent may exit right after it
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with SimulatedFleet(spec) as fleet:
        announce(fleet)
        ends: list[Coroutine[Any, Any, object]] = [stop.wait()]
        if ends_with_parent:
            ends += [_wait_stdin_end(), _wait_parent_exit(parent)]
        tasks = [loop.create_task(end) for end in ends]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            for task in tasks:
                task.cancel()


def _announce(fleet: SimulatedFleet) -> None:
    line = {
        "v": PROTOCOL,
        "urls": fleet.urls,
        "control": fleet.control_url,
        "model": fleet.spec.model,
        "open_files": raise_file_limit(),
    }
    sys.stdout.write(orjson.dumps(line).decode() + "\n")
    sys.stdout.flush()


async def _wait_stdin_end() -> None:
    """Return when standard input ends: the parent closed it, or died."""
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


async def _wait_parent_exit(parent: int) -> None:
    """Return when the parent has exited; a process that it forked may still hold the pipe."""
    while os.getppid() == parent:  # noqa: ASYNC110 - there is no event for a parent's death
        await asyncio.sleep(_ORPHAN_CHECK_S)
