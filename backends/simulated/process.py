"""The fleet as a child process, and from settings to its spec."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
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
        asyncio.run(serve_fleet(spec, watched))
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


async def serve_fleet(spec: SimulationSpec, ends_with_parent: bool) -> None:
    """Serve a fleet until told to stop.

    Args:
        spec: The fleet's specification.
        ends_with_parent: Whether the end of standard input, or of the parent process, is such a
            sign.

    Raises:
        ConfigurationError: The fleet cannot start.
    """
    parent = os.getppid()  # before it is told that all is ready: it may end right then
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with SimulatedFleet(spec) as fleet, asyncio.TaskGroup() as tasks:
        signs = (_wait_stdin_end(), _wait_parent_exit(parent)) if ends_with_parent else ()
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
        "control": fleet.control_url,
        "model": fleet.spec.model,
        "open_files": raise_file_limit(),
    }
    sys.stdout.write(orjson.dumps(line).decode() + "\n")
    sys.stdout.flush()


async def _wait_stdin_end() -> None:
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


async def _wait_parent_exit(parent: int) -> None:
    """Return when the parent is gone; a process that it forked may still hold the pipe."""
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing tells of a parent's death
        await asyncio.sleep(_ORPHAN_CHECK_S)


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
        control_url: URL of the control plane, without a path.
        model: The model served.
        pid: The process.
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

    The child ends when its standard input does, hence with this process, however that ends.

    Args:
        spec: The fleet's specification.
        start_timeout_s: Longest wait for the child to listen, in seconds.

    Yields:
        Where the fleet is.

    Raises:
        ConfigurationError: The fleet refuses the specification, with its own words.
        BackendError: The child cannot be started, died at the start or did not get ready.
    """
    child, said = await _start(), deque[str](maxlen=_LINES)
    listening = asyncio.create_task(_collect(child, said))
    try:
        ready = await _wait_ready(child, spec, start_timeout_s, said, listening)
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
        raise BackendError(f"the simulated fleet's process cannot be started: {error}") from error


async def _collect(child: Process, said: deque[str]) -> None:
    if child.stderr is not None:
        async for line in child.stderr:
            said.append(line.decode(errors="replace").rstrip())


async def _wait_ready(
    child: Process,
    spec: SimulationSpec,
    timeout_s: float,
    said: deque[str],
    listening: asyncio.Task[None],
) -> dict[str, Any]:
    """Hand over the specification and wait for the child's line."""
    try:
        async with asyncio.timeout(timeout_s):
            line = await _send_spec(child, spec)
            if line:
                return dict(orjson.loads(line))
            code = await child.wait()
            await listening
    except TimeoutError:
        raise BackendError(
            f"the simulated fleet was not ready after {timeout_s:g} s; its last words: "
            f"{' / '.join(said) or 'none'}"
        ) from None
    words = "\n".join(said) or "it said nothing"
    if code == _REFUSED:
        raise ConfigurationError(words)
    raise BackendError(f"the simulated fleet ended at its start with exit code {code}: {words}")


async def _send_spec(child: Process, spec: SimulationSpec) -> bytes:
    if child.stdin is None or child.stdout is None:
        raise BackendError("the simulated fleet's process has no pipes")
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


def make_simulation_spec(config: RunConfig) -> SimulationSpec:
    """Return the simulated fleet that the settings describe.

    Raises:
        ConfigurationError: No simulated fleet is configured, there is no such responder, or a
            fault rule is wrong.
        MissingExtraError: The responder needs RDKit.
    """
    simulated = config.endpoints.simulated
    if simulated is None:
        raise ConfigurationError("endpoints.simulated is not set")
    if simulated.responder not in RESPONDERS:
        msg = (
            f"endpoints.simulated.responder: unknown responder {simulated.responder!r}; "
            f"there are {', '.join(sorted(RESPONDERS))}"
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
