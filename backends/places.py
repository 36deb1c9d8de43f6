"""From settings to the places where shards run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib import import_module
from typing import Any

from ..configs.backend import BackendConfig
from .contract.errors import ConfigurationError
from .contract.protocols import Backend
from .sites.executor import ExecutorBackend, WorkShard
from .sites.pool import PoolPolicy, ShardPool


def is_elsewhere(config: BackendConfig) -> bool:
    """Say whether shards run outside this process."""
    return config.kind != "local" or config.processes > 1


def workers(config: BackendConfig) -> int:
    """Return how many workers work on shards at a time, over all places."""
    return config.processes if config.kind == "local" else config.workers


def shares_folder(config: BackendConfig) -> bool:
    """Say whether workers reach the run folder."""
    if config.shared_folder is not None:
        return config.shared_folder
    return config.kind != "globus_compute"


def shard_pool(config: BackendConfig, work: WorkShard) -> ShardPool:
    """Return the places that the settings name, as one.

    Raises:
        ConfigurationError: Something that the settings name is not there.
        MissingExtraError: The kind's package is not installed.
    """
    policy = PoolPolicy(config.attempts, config.deadline_s, config.silence_s)
    return ShardPool(_KINDS[config.kind](config, work), policy)


def _processes(config: BackendConfig, work: WorkShard) -> list[Backend]:
    count = config.processes

    def make() -> Executor:
        # spawned, not forked: this process has threads and an event loop
        return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))

    return [ExecutorBackend(make, work, count, f"{count} processes")]


def _executor(config: BackendConfig, work: WorkShard) -> list[Backend]:
    factory = imported(config.factory or "", "backend.factory")
    return [ExecutorBackend(factory, work, config.workers, f"executor {config.factory}")]


_KINDS: dict[str, Callable[[BackendConfig, WorkShard], list[Backend]]] = {
    "local": _processes,
    "executor": _executor,
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
