"""Simulated fleet in a child process, and its specification from the settings."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Final

import orjson
from pydantic import TypeAdapter, ValidationError

from ...configs.models import RunConfig
from ..core.errors import BackendError, ConfigurationError, MissingExtraError
from ..core.process import raise_file_limit
from .faults import FaultRule
from .fleet import SimulatedFleet
from .responders import RESPONDERS
from .spec import SimulationSpec

PROTOCOL: Final = 1
"""Version of the line that the child prints."""
_ORPHAN_CHECK_S: Final = 1.0
_REFUSED: Final = 2
"""Exit code of a fleet that refuses its specification."""


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
        return _REFUSED
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
    parser.add_argument("--responder", help="generator of the answers: schema or esol")
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


MODULE: Final = "fanfold.backends.simulated"
_START_S: Final = 120.0
_STOP_S: Final = 5.0
_LINES: Final = 20
_LONGEST_LINE: Final = 16 * 1024 * 1024  # one line contains thousands of URLs


@dataclass(frozen=True, slots=True)
class LaunchedFleet:
    """Simulated fleet in a child process.

    Attributes:
        urls: Base URL of each node, ending in ``/v1``.
        control_url: URL of the control plane, without a path.
        model: The served model.
        pid: Id of the child process.
    """

    urls: tuple[str, ...]
    control_url: str
    model: str
    pid: int


@asynccontextmanager
async def launch(
    spec: SimulationSpec, start_timeout_s: float = _START_S
) -> AsyncIterator[LaunchedFleet]:
    """Run a simulated fleet in a child process.

    The child stops when its standard input closes, that is, with this process, however it ends.

    Args:
        spec: The fleet's specification.
        start_timeout_s: Longest wait for the child to listen, in seconds.

    Raises:
        ConfigurationError: The fleet refuses the specification; the message is the fleet's.
        BackendError: The child cannot be started, exits at start or does not become ready.
    """
    child, output = await _start(), deque[str](maxlen=_LINES)
    collecting = asyncio.create_task(_collect(child, output))
    try:
        ready = await _wait_ready(child, spec, start_timeout_s, output, collecting)
        yield LaunchedFleet(
            tuple(ready["urls"]), str(ready["control"]), str(ready["model"]), child.pid
        )
    finally:
        await _stop(child)
        await collecting


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
        raise BackendError(f"the simulated fleet's process cannot be started: {error}") from error


async def _collect(child: Process, output: deque[str]) -> None:
    if child.stderr is not None:
        async for line in child.stderr:
            output.append(line.decode(errors="replace").rstrip())


async def _wait_ready(
    child: Process,
    spec: SimulationSpec,
    timeout_s: float,
    output: deque[str],
    collecting: asyncio.Task[None],
) -> dict[str, Any]:
    """Send the specification and wait for the child's line."""
    try:
        async with asyncio.timeout(timeout_s):
            line = await _send_spec(child, spec)
            if line:
                return dict(orjson.loads(line))
            code = await child.wait()
            await collecting
    except TimeoutError:
        raise BackendError(
            f"the simulated fleet was not ready after {timeout_s:g} s; its last output: "
            f"{' / '.join(output) or 'none'}"
        ) from None
    words = "\n".join(output) or "no output"
    if code == _REFUSED:
        raise ConfigurationError(words)
    raise BackendError(f"the simulated fleet failed to start: exit code {code}: {words}")


async def _send_spec(child: Process, spec: SimulationSpec) -> bytes:
    if child.stdin is None or child.stdout is None:
        raise BackendError("the simulated fleet's process has no pipes")
    child.stdin.write(spec.to_json().encode() + b"\n")
    try:
        await child.stdin.drain()
    except ConnectionError:
        return b""  # it exited before it read; its exit code gives the reason
    return await child.stdout.readline()


async def _stop(child: Process) -> None:
    """Stop the child: close its input, and kill it if that does not help."""
    if child.stdin is not None:
        child.stdin.close()
    try:
        async with asyncio.timeout(_STOP_S):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()


def make_simulation_spec(config: RunConfig) -> SimulationSpec:
    """Return the specification of the simulated fleet in the settings.

    Raises:
        ConfigurationError: No simulated fleet is configured, the responder is unknown, or a fault
            rule is invalid.
        MissingExtraError: The responder needs RDKit.
    """
    simulated = config.endpoints.simulated
    if simulated is None:
        raise ConfigurationError("endpoints.simulated is not set")
    if simulated.responder not in RESPONDERS:
        msg = (
            f"endpoints.simulated.responder: unknown responder {simulated.responder!r}; "
            f"available: {', '.join(sorted(RESPONDERS))}"
        )
        raise ConfigurationError(msg)
    if simulated.responder == "esol" and find_spec("rdkit") is None:
        raise MissingExtraError("endpoints.simulated.responder: esol", "chem")
    for n, rule in enumerate(simulated.faults):
        _check_fault(f"endpoints.simulated.faults.{n}", rule)
    fields = simulated.model_dump(exclude_none=True)
    if config.model.name is not None:
        fields["model"] = config.model.name
    try:
        return SimulationSpec.from_json(orjson.dumps(fields))
    except ConfigurationError as error:
        raise ConfigurationError(f"endpoints.simulated: {error.message}") from None


def _check_fault(key: str, rule: Mapping[str, Any]) -> None:
    try:
        FaultRule.from_mapping(rule)
        TypeAdapter(FaultRule).validate_python(rule)
    except ConfigurationError as error:
        raise ConfigurationError(f"{key}: {error.message}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigurationError(f"{key}.{first['loc'][0]}: {first['msg'].lower()}") from None
    except TypeError as error:
        raise ConfigurationError(f"{key}: a value is of the wrong type: {error}") from None
