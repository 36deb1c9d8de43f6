"""From settings to the places where shards run."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from ...configs.backend import BackendConfig
from ...configs.serialize import secret_texts, written_out
from ..core.errors import ConfigurationError
from ..core.exit_with_parent import follow_parent
from ..core.process import make_room
from ..core.protocols import Backend
from .academy.backend import AcademyBackend, Hall
from .academy.exchange import Meeting
from .executor import ExecutorBackend, WorkShard
from .globus.backend import Desk, globus_backends
from .globus.service import Service, connect
from .globus.tasks import FILE, TaskBook, TaskList
from .launched.backend import (
    Launch,
    LaunchedBackend,
    launcher_words,
    local_words,
    own_host,
    python_words,
)
from .member import PoolPolicy
from .parsl import JobNodes, ParslBackend
from .pool import ShardPool

WORKERS_LOG: Final = "workers.log"
"""In the run's folder: what workers that a launcher started say."""


def shard_pool(
    config: BackendConfig, work: WorkShard, drain_s: float, folder: Path | None = None
) -> ShardPool:
    """Return the places that the settings name, as one.

    Args:
        config: The settings.
        work: What workers run.
        drain_s: Seconds that a worker may take, after its deadline, for items in flight.
        folder: The run's folder, where a place may write down what it has in hand.

    Raises:
        ConfigurationError: Something that the settings name is not there.
        MissingExtraError: The kind's package is not installed.
    """
    policy = PoolPolicy(
        attempts=config.attempts,
        deadline_s=config.deadline_s + drain_s,
        silence_s=config.silence_s,
        queue_s=config.queue_s,
        ahead=1 if config.kind == "local" else 2,  # beside us nothing waits for the next order
    )
    return ShardPool(places(config, work, folder), policy)


def places(config: BackendConfig, work: WorkShard, folder: Path | None = None) -> list[Backend]:
    """Return the places that the settings name, not started; see :func:`shard_pool`.

    Raises:
        ConfigurationError: Something that the settings name is not there.
        MissingExtraError: The kind's package is not installed.
    """
    return _KINDS[config.kind](config, work, folder)


def _processes(config: BackendConfig, work: WorkShard, _: Path | None) -> list[Backend]:
    """Return a place per process: one that dies takes no other with it."""

    def make() -> Executor:
        # spawned, not forked: this process has threads and an event loop
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=follow_parent)

    return [ExecutorBackend(make, work, 1, f"process {n + 1}") for n in range(config.processes)]


def _executor(config: BackendConfig, work: WorkShard, _: Path | None) -> list[Backend]:
    factory = imported(config.factory or "", "backend.factory")
    return [ExecutorBackend(factory, work, config.workers, f"executor {config.factory}")]


def _globus(config: BackendConfig, work: WorkShard, folder: Path | None) -> list[Backend]:
    book = TaskBook(folder / FILE) if folder is not None else None
    options = config.user_endpoint_config
    for key in written_out(options, "backend.user_endpoint_config"):
        msg = (
            f"{key}: a run folder does not keep a secret that was written out; give it again, "
            f"best by a variable: --set '{key}=${{VAR}}'"
        )
        raise ConfigurationError(msg)

    def connected() -> Service:  # off the loop: the SDK takes seconds to import
        make = imported(config.client, "backend.client") if config.client else None
        return connect(make, options, hidden=tuple(secret_texts(options)))

    desk = Desk(connected, work, config.function, TaskList(book))
    return globus_backends(config.endpoints, config.workers, desk)


def _academy(config: BackendConfig, work: WorkShard, _: Path | None) -> list[Backend]:
    """Return a place per agent: one that dies takes no other with it."""
    make = imported(config.executor, "backend.executor") if config.executor else None
    told = config.exchange.model_dump(exclude={"password"})
    secret = config.exchange.password
    password = None if secret is None else secret.get_secret_value()
    at = Meeting(**told, password=password, silence_s=config.silence_s)
    hall = Hall(at, work, config.slots, make)
    return [AcademyBackend(hall, f"agent {n + 1}", config.queue_s) for n in range(config.workers)]


def _parsl(config: BackendConfig, work: WorkShard, folder: Path | None) -> list[Backend]:
    nodes = JobNodes(
        launcher=launcher_words(config.command, config.workers, os.environ) or (),
        python=python_words(os.environ),
        host=own_host(config.host, os.environ),
        folder=folder,
    )
    return [ParslBackend(config.config, work, config.workers, nodes)]


def _launched(config: BackendConfig, work: WorkShard, folder: Path | None) -> list[Backend]:
    words = launcher_words(config.command, config.workers, os.environ)
    make_room(config.workers, "workers", "backend.workers")  # each keeps a connection
    launch = Launch(
        words=words or local_words(config.workers),
        host=own_host(config.host, os.environ),
        silence_s=config.silence_s,
        queue_s=config.queue_s,
        log=None if folder is None else folder / WORKERS_LOG,
    )
    return [LaunchedBackend(launch, work)]


_KINDS: dict[str, Callable[[BackendConfig, WorkShard, Path | None], list[Backend]]] = {
    "local": _processes,
    "executor": _executor,
    "parsl": _parsl,
    "globus_compute": _globus,
    "academy": _academy,
    "launched": _launched,
}


def imported(name: str, key: str) -> Any:
    """Return what ``module:attr`` names.

    Raises:
        ConfigurationError: It cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        msg = f"{key}: {name} cannot be imported: {error} (PYTHONPATH names more folders)"
        raise ConfigurationError(msg) from error
    return found
