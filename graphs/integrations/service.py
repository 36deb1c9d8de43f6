"""Runs of a service: start, watch and stop them by id, and get their outcome."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
from rich.console import Console

from ...backends.core.errors import (
    EXIT_BUDGET,
    EXIT_INTERRUPTED,
    ConfigurationError,
    FanfoldError,
    InputError,
    RunStoppedError,
)
from ...backends.core.types import Json
from ...backends.storage.run_folder import is_vacant, open_folder, write_json
from ...configs.loader import LoadedConfig, load_config
from ...configs.raw_settings import escape_variables
from ...nodes.batch.load import check_run_input
from ...nodes.context import RunTools
from ..caller_policy import CallerPolicy, resolve_below
from ..run.prepare import ReadyRun, prepare_run
from ..run.run_result import RunResult
from ..run.shutdown import Shutdown, session_deadline
from ..session import RunOptions, run_session

logger = logging.getLogger(__name__)

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHOWN: Final = 500
_KEYS: Final = ("items", "path")
_STATES: Final = {EXIT_INTERRUPTED: "interrupted", EXIT_BUDGET: "paused"}
"""States from which a run can be started again, by exit code."""
MAX_AGGREGATE_BYTES: Final = 300_000
"""Largest aggregate that is sent; HTTP exchanges limit a message to 512,000 bytes."""


@dataclass(frozen=True, slots=True)
class Service:
    """Settings and folders of a service.

    Attributes:
        loaded: The settings.
        home: Folder of the run folders, each named by its run id.
        inputs: Folder in which callers may name files; None refuses paths.
        allow_simulated: Allow a simulated fleet.
    """

    loaded: LoadedConfig
    home: Path
    inputs: Path | None = None
    allow_simulated: bool = True

    def run_folder(self, run_id: str) -> Path:
        """Return the folder of a run.

        Raises:
            InputError: The id is not a plain name.
        """
        if not isinstance(run_id, str) or not _ID.fullmatch(run_id):
            msg = "run_id: give 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
            raise InputError(msg)
        return self.home / run_id

    def load_settings(self, request: Mapping[str, Any]) -> LoadedConfig:
        """Return the settings with the input of a request; blocks.

        Raises:
            ConfigurationError: An item that is itself a request sets what a caller may not set.
            InputError: The request has unknown keys, both inputs, an empty input, or a path that is
                not allowed.
        """
        check_run_input(request, where="request", keys=_KEYS)
        path, items = request.get("path"), request.get("items")
        if path is None:
            if items is not None:
                CallerPolicy().check_items(self.loaded.config.input, items)
            return self.loaded
        if self.inputs is None:
            raise InputError("request.path: this service takes no paths; give items")
        full = resolve_below(self.inputs, str(path), "request.path")
        changes = {"input.path": escape_variables(str(full)), "input.dataset": None}
        loaded = load_config(self.loaded.raw, settings=changes)
        CallerPolicy().check_items(loaded.config.input, None)
        return loaded


class ServiceRun:
    """One run of a service.

    Args:
        service: The service.
        loaded: The settings, with the input of the request.
        run_id: The run's id.
        request: ``{"items": […]}``, ``{"path": …}`` or ``{}`` for the configured input.
    """

    def __init__(
        self, service: Service, loaded: LoadedConfig, run_id: str, request: Mapping[str, Any]
    ) -> None:
        self.run_id = run_id
        self._service, self._loaded, self._request = service, loaded, request
        self._path = service.run_folder(run_id)
        self._stop = Shutdown(Console(file=io.StringIO()))
        self._tools: RunTools | None = None
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._log_failure)

    def _log_failure(self, task: asyncio.Task[RunResult]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            is_known = isinstance(error, FanfoldError)
            logger.warning("run %s: %s", self.run_id, error, exc_info=None if is_known else error)

    @property
    def task(self) -> asyncio.Task[RunResult]:
        """Return the task of the run."""
        return self._task

    def cancel(self) -> None:
        """Stop after the items in flight; the run can be started again later."""
        if not self._task.done():
            self._stop.request_stop("cancel")

    def is_same_request(self, request: Mapping[str, Any]) -> bool:
        """Return True if the run was started with this request."""
        return _digest(self._request) == _digest(request)

    async def _run(self) -> RunResult:
        began, run = time.time(), await self._open_folder()
        end = session_deadline(self._loaded.config, began)
        options, console = RunOptions(quiet=True, deadline=end), Console(file=io.StringIO())
        with self._stop.stop_at_deadline(end):
            return await run_session(run, options, console, self._stop, on_open=self._set_tools)

    async def _open_folder(self) -> ReadyRun:
        """Create the run folder, or open that of an earlier process."""
        expected = {"v": 1, "request": _digest(self._request)}
        if await asyncio.to_thread(is_vacant, self._path):
            items, allowed = self._request.get("items"), self._service.allow_simulated
            run = await prepare_run(self._loaded, self._path, items, allowed)
            await asyncio.to_thread(write_json, self._path / "request.json", expected)
            return run
        folder = await asyncio.to_thread(open_folder, self._path)
        file = self._path / "request.json"
        found = await asyncio.to_thread(lambda: file.read_bytes() if file.exists() else b"{}")
        if orjson.loads(found) not in ({}, expected):
            msg = f"run_id: {self.run_id} was started with another request; choose another id"
            raise InputError(msg)
        return ReadyRun(folder, self._loaded)

    def _set_tools(self, tools: RunTools) -> None:
        self._tools = tools

    def status(self) -> dict[str, Json]:
        """Return the ``state`` and ``progress`` of the run."""
        return {"v": 1, "run_id": self.run_id, "state": self._state(), "progress": self._progress()}

    def _state(self) -> str:
        if not self._task.done():
            return "starting" if self._tools is None else "running"
        if (error := self._error()) is not None:
            return "interrupted" if isinstance(error, RunStoppedError) else "failed"
        return _STATES.get(self._task.result().exit_code, "done")

    def _error(self) -> BaseException | None:
        return asyncio.CancelledError() if self._task.cancelled() else self._task.exception()

    def _progress(self) -> dict[str, Json]:
        if self._tools is None:
            return {}
        now, usage = self._tools.progress, self._tools.progress.usage
        tokens = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens}
        counts = {"items": now.total, "done": now.done, "failed": now.failed}
        about = {"requests": usage.requests, "tokens": tokens, "simulated": self._tools.simulated}
        return {**counts, **about}

    def outcome(self) -> dict[str, Json]:
        """Return the status of the run and, once it has ended, its result or error."""
        reply = self.status()
        if not self._task.done():
            return reply
        if (error := self._error()) is not None:
            return reply | {"error": make_error_reply(error)}
        result = self._task.result()
        if reply["state"] in _STATES.values():
            return reply | {"reason": result.reason}
        return reply | {
            "progress": result.progress,
            **limit_aggregate(result.aggregate),
            "results": {
                "folder": str(result.folder.path),
                "table": str(result.folder.results),
                "failures": str(result.folder.failures),
                "simulated": result.simulated,
            },
        }


def limit_aggregate(aggregate: list[dict[str, Any]]) -> dict[str, Json]:
    """Return the aggregate if it fits a message, else where to read it."""
    size = len(orjson.dumps(aggregate))
    if size <= MAX_AGGREGATE_BYTES:
        return {"aggregate": aggregate}
    left_out = f"the aggregate has {size:,} bytes; read aggregate.json in results.folder"
    return {"aggregate": None, "left_out": left_out}


def make_error_reply(error: BaseException) -> dict[str, Json]:
    """Return an error as plain data, because exchanges do not carry exceptions."""
    text = error.message if isinstance(error, FanfoldError) else str(error) or repr(error)
    kind = "configuration" if isinstance(error, ConfigurationError) else "run"
    if isinstance(error, InputError):
        kind = "input"
    return {"kind": kind, "type": type(error).__name__, "message": text[:_SHOWN]}


def _digest(request: Mapping[str, Any]) -> str:
    data = orjson.dumps(dict(request), option=orjson.OPT_SORT_KEYS, default=str)
    return hashlib.blake2b(data, digest_size=16).hexdigest()
