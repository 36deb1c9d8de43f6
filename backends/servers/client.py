"""Use a node's servers from a worker: the first one starts them, all wait until they are up."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from tenacity import AsyncRetrying, RetryError, retry_if_result, stop_after_delay, wait_fixed

from ..core.errors import ConfigurationError, RunStoppedError
from .lock import (
    ServedModel,
    hold_user_lock,
    is_served,
    read_owner,
    read_served_model,
    request_stop_when_unused,
)
from .plan import NodeFiles, NodePlan, ServerFailure, node_files

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.5
_SLACK_S: Final = 30.0
_RECENT_FAILURE_S: Final = 600.0
_MAX_STARTS: Final = 3


def _never() -> str | None:
    return None


@asynccontextmanager
async def use_servers(
    plan: NodePlan, stop_reason: Callable[[], str | None] = _never
) -> AsyncIterator[Path]:
    """Use this node's servers while the block runs, and start them if no process serves the node.

    Servers of another model that a worker started are ended first, once they have no user.

    Args:
        plan: The servers.
        stop_reason: Returns why to stop waiting, or None; may block for a moment.

    Yields:
        The node's endpoints file; at least one server is in it.

    Raises:
        RunStoppedError: No server is ready in time, the wait was stopped, or all servers were given
            up; with their last lines.
        ConfigurationError: The servers folder cannot be created.
    """
    files = node_files(plan)
    await asyncio.to_thread(files.create_folders)
    while True:
        await _end_other_servers(plan, files, stop_reason)
        async with hold_user_lock(files):
            try:
                await _wait_until_up(plan, files, stop_reason)
            except _OtherModelError:
                continue
            yield files.endpoints
            return


class _OtherModelError(Exception):
    """Meanwhile another worker has started servers of another model."""


def _find_other_model(plan: NodePlan, files: NodeFiles) -> ServedModel | None:
    """Return what the node serves if that is another model; blocks."""
    served = read_served_model(files) if is_served(files) else None
    if served is None or not served.name or not plan.model or served.name == plan.model:
        return None
    # Servers may have several names of models, such as those of adapters.
    return None if served.servers == plan.compute_servers_digest() else served


async def _end_other_servers(
    plan: NodePlan, files: NodeFiles, stop_reason: Callable[[], str | None]
) -> None:
    """Let servers of another model end, which may need the same accelerators and ports.

    Raises:
        RunStoppedError: They run for the whole job, or the wait was stopped.
    """
    before: ServedModel | None = None
    while (served := await asyncio.to_thread(_find_other_model, plan, files)) is not None:
        if served.on_demand:
            await asyncio.to_thread(request_stop_when_unused, files)
            if before is None:
                text = "%s: waits until the servers of model %s have ended, to start those of %s"
                logger.info(text, plan.host, served.name, plan.model)
        elif served == before:  # asked twice: its file may be that of an earlier process
            msg = (
                f"{plan.host}: its servers serve {served.name!r}, and the run needs "
                f"{plan.model!r}; {read_owner(files)} runs them: end it, or use another node"
            )
            raise RunStoppedError(msg)
        before = served
        if why := await asyncio.to_thread(stop_reason):
            msg = f"{plan.host}: {why} before the servers of {served.name!r} had ended"
            raise RunStoppedError(msg)
        await asyncio.sleep(_POLL_S)


async def _wait_until_up(
    plan: NodePlan, files: NodeFiles, stop_reason: Callable[[], str | None]
) -> None:
    """Wait until a server is ready; start the supervisor if there is none.

    Raises:
        _OtherModelError: The node serves another model.
    """
    starts = 0

    async def is_up() -> bool:
        nonlocal starts
        if await asyncio.to_thread(is_served, files):
            if await asyncio.to_thread(_find_other_model, plan, files) is not None:
                raise _OtherModelError
            if await asyncio.to_thread(files.endpoints.is_file):
                return True
        elif starts >= _MAX_STARTS:
            msg = f"{plan.host}: the node's supervisor ends repeatedly; see {files.supervisor_log}"
            raise RunStoppedError(msg)
        else:
            await asyncio.to_thread(check_failure, plan)
            logger.info("%s: this worker starts the node's servers", plan.host)
            await asyncio.to_thread(_start_supervisor, plan, files)
            starts += 1
        if why := await asyncio.to_thread(stop_reason):
            raise RunStoppedError(f"{plan.host}: {why} before the node's servers were ready")
        return False

    retrying = AsyncRetrying(
        sleep=asyncio.sleep,
        retry=retry_if_result(lambda up: not up),
        stop=stop_after_delay(plan.timeout_s + _SLACK_S),
        wait=wait_fixed(_POLL_S),
    )
    try:
        await retrying(is_up)
    except RetryError:
        msg = (
            f"{plan.host}: no server of this node was ready within {plan.timeout_s:g} s "
            f"(node.timeout_s); their logs: {files.server_log(0).parent}"
        )
        raise RunStoppedError(msg) from None


def check_failure(plan: NodePlan) -> None:
    """Raise an error if the servers of a plan were given up a short while ago; blocks.

    Those of another model, or with another command, say nothing about these.

    Raises:
        RunStoppedError: They were given up; with their last lines.
    """
    files = node_files(plan)
    try:
        age = time.time() - files.failure.stat().st_mtime
        failure = ServerFailure.read(files.failure)
    except (OSError, ValueError):
        return  # no failure
    if age < _RECENT_FAILURE_S and failure.plan == plan.compute_digest():
        raise RunStoppedError(f"the servers of {plan.host} were given up: {failure.text}")


def _start_supervisor(plan: NodePlan, files: NodeFiles) -> None:
    """Start a detached process that serves the node.

    Raises:
        ConfigurationError: Its log cannot be written.
        RunStoppedError: It cannot be started.
    """
    command = [sys.executable, "-P", "-m", __package__]
    try:
        with files.supervisor_log.open("ab") as log:
            completed = subprocess.run(
                command,
                input=plan.to_json(),
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
                check=False,
            )
    except OSError as error:
        msg = f"{files.supervisor_log}: cannot be written: {error.strerror}"
        raise ConfigurationError(msg) from None
    if completed.returncode:
        msg = f"{plan.host}: the node's servers cannot be started; see {files.supervisor_log}"
        raise RunStoppedError(msg)
