"""The whole map-reduce as an agent of Academy. Needs the extra ``academy``."""

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
    """Return a configuration with which an agent takes and sends JSON only, never a pickle."""
    json = SerializationStrategy.JSON
    return RuntimeConfig(allowed_deserializers={json}, default_serializer=json)


class MapReduceAgent(Agent):
    """Runs batches for other agents. What it takes and gives is plain JSON, errors included.

    A run outlives the call that starts it: ``start`` answers at once, ``status`` and ``result``
    ask. Every answer has ``v``, ``run_id`` and ``state`` (``starting``, ``running``, ``done``,
    ``paused`` for its budget, ``interrupted``, ``failed``, ``unknown``), or ``error`` with
    ``kind``, ``type`` and ``message``. Runs lie in folders below ``home``: a new agent with the
    same ``home`` goes on with them when they are started again.

    Args:
        spec: A preset's name, a YAML file, or settings as a mapping.
        home: Where the runs' folders lie.
        inputs: Callers may name input files below this folder; None refuses paths.
        allow_simulated: Whether a simulated fleet may be asked.
        event_s: Least seconds between two progress events of a run.

    Raises:
        ConfigurationError: A setting is wrong, or the fleet is simulated and that was not
            allowed.
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
        """Start a run, or go on with one that was interrupted; starting it twice is one run.

        Args:
            request: ``{"items": […]}``, ``{"path": …}``, or ``{}`` for the configured input.
            run_id: A name of the caller's for the run; made here if None.
            listener: UUID of an agent whose action ``progress(run_id, event)`` is told how the
                run goes on, and how it ends.
        """
        run_id = run_id or secrets.token_hex(8)
        try:
            served = await self._get_or_start(run_id, request)
            if listener is not None:
                agent: AgentId[Any] = AgentId(uid=_uuid(listener), name=None, role="agent")
                task = asyncio.create_task(self._notify_listener(served, Handle(agent)))
                self._notifications.add(task)
                task.add_done_callback(self._notifications.discard)
        except FanfoldError as error:
            return {"v": 1, "run_id": run_id, "error": make_error_reply(error)}
        return served.status()

    async def _get_or_start(self, run_id: str, request: Mapping[str, Any]) -> ServiceRun:
        self._service.run_folder(run_id)  # says what an id may be
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
        """Tell where a run is."""
        served = self._runs.get(run_id)
        return _unknown_run(run_id) if served is None else served.status()

    @action
    async def result(self, run_id: str, wait_s: float = 30.0) -> dict[str, Json]:
        """Wait for a run's end for a while; tell how it ended, or where it is.

        Args:
            run_id: The run.
            wait_s: Most seconds to wait; ask again for longer runs.
        """
        served = self._runs.get(run_id)
        if served is None:
            return _unknown_run(run_id)
        await asyncio.wait({served.task}, timeout=min(max(0.0, wait_s), _MOST_WAIT_S))
        return served.outcome()

    @action
    async def cancel(self, run_id: str) -> dict[str, Json]:
        """Let no further item of a run begin; what is finished is kept."""
        served = self._runs.get(run_id)
        if served is None:
            return _unknown_run(run_id)
        served.cancel()
        return served.status()

    async def _notify_listener(self, served: ServiceRun, listener: Handle[Any]) -> None:
        """Tell a listener how a run goes on until it ends; a deaf one is given up."""
        told: dict[str, Json] | None = None
        while True:
            ended, _ = await asyncio.wait({served.task}, timeout=self._event_s)
            event = served.outcome() if ended else served.status()
            if event == told:
                continue
            try:
                await asyncio.wait_for(listener.progress(served.run_id, event), _TELL_S)
            except Exception as error:  # noqa: BLE001 - whatever ails a listener, the run goes on
                logger.warning("run %s: its listener is told no more: %r", served.run_id, error)
                return
            if ended:
                return
            told = event

    async def agent_on_shutdown(self) -> None:
        """Stop all runs as ``cancel`` does, and wait for them."""
        running = {served.task for served in self._runs.values() if not served.task.done()}
        for served in self._runs.values():
            served.cancel()
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
