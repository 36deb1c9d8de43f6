"""The map-reduce as an Academy agent; requires the extra ``academy``."""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...backends.core.errors import ConfigurationError, FanfoldError, InputError, MissingExtraError
from ...backends.core.types import Json
from ...configs.resolve import resolve_config
from .service import Service, ServiceRun, make_error_reply

try:
    from academy.agent import Agent, action
    from academy.handle import Handle
    from academy.identifier import AgentId
    from academy.runtime import RuntimeConfig
    from academy.serialize import SerializationStrategy
except ModuleNotFoundError as error:
    raise MissingExtraError("MapReduceAgent", "academy") from error

logger = logging.getLogger(__name__)

_EVENT_S: Final = 1.0
_TELL_S: Final = 30.0
_MOST_WAIT_S: Final = 300.0


def plain_exchange() -> RuntimeConfig:
    """Return a runtime configuration that accepts and sends only JSON, never pickles."""
    json = SerializationStrategy.JSON
    return RuntimeConfig(allowed_deserializers={json}, default_serializer=json)


class MapReduceAgent(Agent):
    """Runs batches for other agents; requests and answers are plain JSON, including errors.

    A run outlives the call that starts it: ``start`` returns at once, ``status`` and ``result``
    query it. Every answer has ``v``, ``run_id`` and ``state`` (``starting``, ``running``, ``done``,
    ``paused`` for its budget, ``interrupted``, ``failed``, ``unknown``), or ``error`` with
    ``kind``, ``type`` and ``message``. Run folders are in ``home``: a new agent with the
    same ``home`` resumes a run when it is started again.

    Args:
        spec: A preset's name, a YAML file, or settings as a mapping.
        home: Folder of the run folders.
        inputs: Folder in which callers may name input files; None refuses paths.
        allow_simulated: Allow a simulated fleet.
        event_s: Minimum seconds between two progress events of a run.

    Raises:
        ConfigurationError: A setting is wrong, or the fleet is simulated without permission.
    """

    def __init__(
        self,
        spec: str | dict[str, Any],
        home: str,
        *,
        inputs: str | None = None,
        allow_simulated: bool = False,
        event_s: float = _EVENT_S,
    ) -> None:
        super().__init__()
        loaded = resolve_config(spec)[0]
        if loaded.config.endpoints.simulated is not None and not allow_simulated:
            msg = "the settings run on a simulated fleet; set endpoints, or allow_simulated=True"
            raise ConfigurationError(msg)
        given = None if inputs is None else Path(inputs)
        self._service = Service(loaded, Path(home).absolute(), given, allow_simulated)
        self._runs: dict[str, ServiceRun] = {}
        self._notifications = set[asyncio.Task[None]]()
        self._event_s = event_s

    @action
    async def start(
        self, request: dict[str, Any], run_id: str | None = None, listener: str | None = None
    ) -> dict[str, Json]:
        """Start a run, or resume an interrupted one; starting it twice makes one run.

        Args:
            request: ``{"items": […]}``, ``{"path": …}``, or ``{}`` for the configured input.
            run_id: A name for the run; None generates one.
            listener: UUID of an agent whose action ``progress(run_id, event)`` receives progress
                events and the outcome.
        """
        run_id = run_id or secrets.token_hex(8)
        try:
            run = await self._get_or_start(run_id, request)
            if listener is not None:
                agent: AgentId[Any] = AgentId(uid=_uuid(listener), name=None, role="agent")
                task = asyncio.create_task(self._notify_listener(run, Handle(agent)))
                self._notifications.add(task)
                task.add_done_callback(self._notifications.discard)
        except FanfoldError as error:
            return {"v": 1, "run_id": run_id, "error": make_error_reply(error)}
        return run.status()

    async def _get_or_start(self, run_id: str, request: Mapping[str, Any]) -> ServiceRun:
        self._service.run_folder(run_id)  # raises if the id is not valid
        loaded = await asyncio.to_thread(self._service.load_settings, request)
        known = self._runs.get(run_id)
        state = "unknown" if known is None else known.status()["state"]
        if known is None or state in {"failed", "interrupted", "paused"}:
            known = self._runs[run_id] = ServiceRun(self._service, loaded, run_id, request)
        elif not known.is_same_request(request):
            msg = f"run_id: {run_id} was started with another request; choose another id"
            raise InputError(msg)
        return known

    @action
    async def status(self, run_id: str) -> dict[str, Json]:
        """Return the state and progress of a run."""
        run = self._runs.get(run_id)
        return _unknown_run(run_id) if run is None else run.status()

    @action
    async def result(self, run_id: str, wait_s: float = 30.0) -> dict[str, Json]:
        """Wait for the end of a run; return its outcome, or its state if it still runs.

        Args:
            run_id: The run.
            wait_s: Maximum seconds to wait; call again for longer runs.
        """
        run = self._runs.get(run_id)
        if run is None:
            return _unknown_run(run_id)
        await asyncio.wait({run.task}, timeout=min(max(0.0, wait_s), _MOST_WAIT_S))
        return run.outcome()

    @action
    async def cancel(self, run_id: str) -> dict[str, Json]:
        """Stop a run after the items in flight; finished items are kept."""
        run = self._runs.get(run_id)
        if run is None:
            return _unknown_run(run_id)
        run.cancel()
        return run.status()

    async def _notify_listener(self, run: ServiceRun, listener: Handle[Any]) -> None:
        """Send progress events to a listener until the run ends or the listener fails."""
        sent: dict[str, Json] | None = None
        while True:
            ended, _ = await asyncio.wait({run.task}, timeout=self._event_s)
            event = run.outcome() if ended else run.status()
            if event == sent:
                continue
            try:
                await asyncio.wait_for(listener.progress(run.run_id, event), _TELL_S)
            except Exception as error:  # noqa: BLE001 - a failing listener must not stop the run
                logger.warning("run %s: no further events for its listener: %r", run.run_id, error)
                return
            if ended:
                return
            sent = event

    async def agent_on_shutdown(self) -> None:
        """Stop all runs as ``cancel`` does, and wait for them."""
        running = {run.task for run in self._runs.values() if not run.task.done()}
        for run in self._runs.values():
            run.cancel()
        for task in self._notifications:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=self._service.loaded.config.limits.drain_s + 5)


def _unknown_run(run_id: str) -> dict[str, Json]:
    return {"v": 1, "run_id": run_id, "state": "unknown"}


def _uuid(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(str(text))
    except ValueError:
        raise InputError("listener: give the UUID of an agent's mailbox") from None
