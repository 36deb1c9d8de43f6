"""Simulated fleet in a child process, and its specification from the settings."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import orjson
from pydantic import TypeAdapter, ValidationError

from ...configs.models import RunConfig
from ..core.errors import BackendError, ConfigurationError, MissingExtraError

if TYPE_CHECKING:
    from .spec import SimulationSpec

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
    from .spec import REFUSED  # noqa: PLC0415

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
    if code == REFUSED:
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
    # for runs with a simulated fleet only
    from .responders import RESPONDERS  # noqa: PLC0415
    from .spec import SimulationSpec  # noqa: PLC0415

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
    from .faults import FaultRule  # noqa: PLC0415

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
