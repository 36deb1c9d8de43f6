"""Make the backends of a run from its settings."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from ...configs.backend import BackendConfig
from ...configs.serialize import find_masked_keys, iter_secret_texts
from ..core.errors import ConfigurationError
from ..core.exit_with_parent import exit_with_parent
from ..core.process import ensure_open_files
from ..core.protocols import Backend
from .executor import ExecutorBackend, WorkShard
from .globus.backend import TaskSubmitter, make_globus_backends
from .globus.service import TaskService, connect_service
from .globus.tasks import TASK_LOG_FILE, TaskLog, TaskRegistry
from .member import PoolPolicy
from .parsl import JobNodes, ParslBackend
from .pool import BackendPool

WORKERS_LOG: Final = "workers.log"
"""File in the run folder: output of the workers that a launcher started."""


def make_backend_pool(
    config: BackendConfig,
    work: WorkShard,
    drain_s: float,
    folder: Path | None = None,
    *,
    stays_open: bool = False,
) -> BackendPool:
    """Return a pool of the backends in the settings.

    Args:
        config: The settings.
        work: The function that workers run.
        drain_s: Seconds that a worker may take, after its deadline, for items in flight.
        folder: The run folder, where a backend may keep a log of its tasks.
        stays_open: Whether the backends stay open at the end of a run, for the next one.

    Raises:
        ConfigurationError: An object or file that the settings name does not exist.
        MissingExtraError: The package of the backend is not installed.
    """
    policy = PoolPolicy(
        attempts=config.attempts,
        deadline_s=config.deadline_s + drain_s,
        silence_s=config.silence_s,
        queue_s=config.queue_s,
        # a local process starts the next task at once, without a second one in its queue
        tasks_per_worker=1 if config.kind == "local" else 2,
    )
    return BackendPool(make_backends(config, work, folder), policy, stays_open=stays_open)


def make_backends(
    config: BackendConfig, work: WorkShard, folder: Path | None = None
) -> list[Backend]:
    """Return the backends in the settings, not started; see :func:`make_backend_pool`.

    Raises:
        ConfigurationError: An object or file that the settings name does not exist.
        MissingExtraError: The package of the backend is not installed.
    """
    return BACKENDS[config.kind](config, work, folder)


def _local_backends(config: BackendConfig, work: WorkShard, _: Path | None) -> list[Backend]:
    """Return a backend per process: one that dies does not affect the others."""

    def make() -> Executor:
        # spawned, not forked: this process has threads and an event loop
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=exit_with_parent)

    return [ExecutorBackend(make, work, 1, f"process {n + 1}") for n in range(config.processes)]


def _executor_backends(config: BackendConfig, work: WorkShard, _: Path | None) -> list[Backend]:
    factory = import_object(config.factory or "", "backend.factory")
    return [ExecutorBackend(factory, work, config.workers, f"executor {config.factory}")]


def _globus_backends(config: BackendConfig, work: WorkShard, folder: Path | None) -> list[Backend]:
    log = TaskLog(folder / TASK_LOG_FILE) if folder is not None else None
    options = config.user_endpoint_config
    for key in find_masked_keys(options, "backend.user_endpoint_config"):
        msg = (
            f"{key}: a run folder does not keep a secret in plain text; pass it again, "
            f"preferably as a variable: --set '{key}=${{VAR}}'"
        )
        raise ConfigurationError(msg)

    def connected() -> TaskService:  # called in a thread: the SDK takes seconds to import
        make = import_object(config.client, "backend.client") if config.client else None
        return connect_service(make, options, hidden=tuple(iter_secret_texts(options)))

    submitter = TaskSubmitter(connected, work, config.function, TaskRegistry(log))
    return make_globus_backends(config.endpoints, config.workers, submitter)


def _academy_backends(config: BackendConfig, work: WorkShard, _: Path | None) -> list[Backend]:
    """Return a backend per agent: one that dies does not affect the others."""
    # slow to import, as all that has an HTTP server
    from .academy.backend import AcademyBackend, AgentManager  # noqa: PLC0415
    from .academy.exchange import ExchangeSettings  # noqa: PLC0415

    make = import_object(config.executor, "backend.executor") if config.executor else None
    settings = ExchangeSettings(config.exchange, config.silence_s)
    manager = AgentManager(settings, work, config.slots, make)
    return [
        AcademyBackend(manager, f"agent {n + 1}", config.queue_s) for n in range(config.workers)
    ]


def _parsl_backends(config: BackendConfig, work: WorkShard, folder: Path | None) -> list[Backend]:
    from .launched.backend import (  # noqa: PLC0415 - as above
        coordinator_host,
        launcher_command,
        python_command,
    )

    nodes = JobNodes(
        launcher=launcher_command(config.command, config.workers, os.environ) or (),
        python=python_command(os.environ),
        host=coordinator_host(config.host, os.environ),
        folder=folder,
    )
    return [ParslBackend(config.config, work, config.workers, nodes)]


def _launched_backends(
    config: BackendConfig, work: WorkShard, folder: Path | None
) -> list[Backend]:
    from .launched.backend import LaunchedBackend  # noqa: PLC0415 - as above

    ensure_open_files(config.workers, "workers", "backend.workers")  # one connection each
    return [LaunchedBackend(config, work, None if folder is None else folder / WORKERS_LOG)]


BACKENDS: Final[dict[str, Callable[[BackendConfig, WorkShard, Path | None], list[Backend]]]] = {
    "local": _local_backends,
    "executor": _executor_backends,
    "parsl": _parsl_backends,
    "globus_compute": _globus_backends,
    "academy": _academy_backends,
    "launched": _launched_backends,
}
"""Functions that make the backends of a run, by kind; :mod:`configs.backend` has the settings."""


def import_object(name: str, key: str) -> Any:
    """Import the object ``module:attr``.

    Raises:
        ConfigurationError: It cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        msg = f"{key}: {name} cannot be imported: {error} (add its folder to PYTHONPATH)"
        raise ConfigurationError(msg) from error
    return found
