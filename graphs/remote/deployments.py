"""Deployments behind a gateway: the coordinator follows them, and starts a model for all workers.

The coordinator writes their states to a file in the journal folder that the workers share. A worker
whose request shows that a model has stopped creates a file beside it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import orjson

from ...backends.core.errors import RunStoppedError
from ...backends.core.values import parse_json
from ...backends.discovery.connect import ReadyEndpoints
from ...backends.fleet.endpoint import DeploymentState, Endpoint, EndpointSpec
from ...backends.fleet.fleet import Fleet
from .heartbeat import states_file, stopped_model_file

logger = logging.getLogger(__name__)

_POLL_S: Final = 1.0
_READ_S: Final = 2.0
"""Seconds between two looks at the shared states by a worker."""


@dataclass(frozen=True, slots=True)
class SharedWatch:
    """The state of one model, as the coordinator of the run follows it for all workers.

    Attributes:
        journal: The journal folder that the workers share.
        token: Identifies the session.
        path: ``cluster/framework``.
        start_wait_s: Longest wait for the model's start, in seconds.
    """

    journal: Path
    token: str
    path: str
    start_wait_s: float

    @property
    def poll_s(self) -> float:
        """Return the seconds between two reads."""
        return _READ_S

    @property
    def wake_again_s(self) -> float:
        """Return infinity: a worker never starts the model."""
        return float("inf")

    @property
    def starts_models(self) -> bool:
        """Return False: the coordinator starts the model."""
        return False

    async def report_stopped(self) -> None:
        """Tell the coordinator that the model does not run."""
        file = stopped_model_file(self.journal, self.token, self.path)
        try:
            await asyncio.to_thread(file.touch)
        except OSError as error:  # other workers tell it, too
            logger.warning("%s: cannot be created: %s", file, error.strerror)

    async def read_state(self) -> DeploymentState | None:
        """Return the state now, or None if it is unknown.

        Raises:
            RunStoppedError: The coordinator does not wait for the model any more.
        """
        return await asyncio.to_thread(self._read)

    def _read(self) -> DeploymentState | None:
        try:
            if stopped_model_file(self.journal, self.token, self.path).exists():
                return DeploymentState.COLD  # the coordinator has not seen it yet
            document = parse_json(states_file(self.journal, self.token).read_bytes())
            stopped, state = document["stopped"], document["states"].get(self.path)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return None
        if isinstance(stopped, str):
            raise RunStoppedError(stopped)
        known = {one.value: one for one in DeploymentState}
        return known.get(state)


async def share_watches(ready: ReadyEndpoints, journal: Path, token: str) -> ReadyEndpoints:
    """Return the endpoints of a worker whose states the coordinator follows, as they are now.

    Args:
        ready: The endpoints.
        journal: The journal folder that the workers share.
        token: Identifies the session.

    Raises:
        RunStoppedError: The coordinator does not wait for the model any more.
    """

    async def share(spec: EndpointSpec) -> EndpointSpec:
        if spec.watch is None or spec.label is None:
            return spec
        watch = SharedWatch(journal, token, spec.label, spec.watch.start_wait_s)
        return replace(spec, watch=watch, state=await watch.read_state() or spec.state)

    return replace(ready, specs=tuple([await share(spec) for spec in ready.specs]))


@asynccontextmanager
async def follow_deployments(
    fleet: Fleet | None, journal: Path | None, token: str
) -> AsyncIterator[None]:
    """Follow the deployments for the workers while the block runs.

    Args:
        fleet: The deployments, which gets no item; None if there is no gateway.
        journal: The journal folder that the workers share; without one each looks for itself.
        token: Identifies the session.
    """
    if fleet is None or journal is None:
        yield
        return
    following = asyncio.create_task(_follow(fleet, journal, token))
    try:
        yield
    finally:
        following.cancel()
        await asyncio.wait({following})
        files = [states_file(journal, token), *_list_stopped(fleet.endpoints, journal, token)]
        await asyncio.to_thread(_remove, files)


async def _follow(fleet: Fleet, journal: Path, token: str) -> None:
    written: Mapping[str, Any] = {}
    failed = False
    while True:
        reported = await asyncio.to_thread(_find_reported, fleet.endpoints, journal, token)
        for endpoint in reported:
            fleet.report_stopped_model(endpoint)
        states = {endpoint.label: _describe(endpoint).value for endpoint in fleet.endpoints}
        document = {"states": states, "stopped": fleet.stop_reason}
        try:
            if document != written:
                await asyncio.to_thread(_write, states_file(journal, token), document)
                written = document
            files = [stopped_model_file(journal, token, one.label) for one in reported]
            await asyncio.to_thread(_remove, files)
            failed = False
        except OSError as error:
            if not failed:
                logger.warning("%s: %s (will retry)", journal, error.strerror)
            failed = True
        await asyncio.sleep(_POLL_S)


def _describe(endpoint: Endpoint) -> DeploymentState:
    if endpoint.alive:
        return DeploymentState.RUNNING
    return DeploymentState.STARTING if endpoint.standby else DeploymentState.COLD


def _list_stopped(endpoints: Sequence[Endpoint], journal: Path, token: str) -> list[Path]:
    return [stopped_model_file(journal, token, endpoint.label) for endpoint in endpoints]


def _find_reported(endpoints: Sequence[Endpoint], journal: Path, token: str) -> list[Endpoint]:
    """Return the deployments of which a worker says that the model has stopped; blocks."""
    found = list[Endpoint]()
    for endpoint in endpoints:
        with suppress(OSError):
            if stopped_model_file(journal, token, endpoint.label).exists():
                found.append(endpoint)
    return found


def _write(file: Path, document: Mapping[str, Any]) -> None:
    new = file.with_name(f"{file.name}.new")
    new.write_bytes(orjson.dumps(document))
    os.replace(new, file)  # noqa: PTH105 - the pair of write_bytes


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
