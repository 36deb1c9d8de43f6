"""Configurations of Parsl that fanfold brings: of this machine, and of the batch job around it."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..core import exit_with_parent
from ..core.errors import ConfigurationError
from ..core.exit_with_parent import launcher_leash, shell_leash

_INTERCHANGE: Final = "parsl.executors.high_throughput.interchange"
_POOL: Final = "parsl.executors.high_throughput.process_worker_pool"
_POOL_SCRIPT: Final = "process_worker_pool.py"
_HEARTBEAT_S: Final = 2
_SILENCE_S: Final = 15
_JOB_HEARTBEAT_S: Final = 10
_JOB_SILENCE_S: Final = 60


@dataclass(frozen=True, slots=True)
class JobNodes:
    """The nodes of the batch job around this process.

    Attributes:
        launcher: Words of the command that starts one program on each; empty where nobody says.
        python: Words that start Python there.
        host: Name or address of this machine by which they reach it.
        folder: A folder that all of them reach; None is the system's temporary one.
    """

    launcher: Sequence[str]
    python: Sequence[str]
    host: str
    folder: Path | None


def htex_local(workers: int, folder: Path) -> Any:
    """Return a ``parsl.Config`` of one pool of worker processes on this machine's loopback.

    Nothing outlives the coordinator: neither the interchange nor the workers, whatever ends it.

    Args:
        workers: How many.
        folder: For Parsl's own files.
    """
    from parsl.config import Config  # noqa: PLC0415 - an extra
    from parsl.executors import HighThroughputExecutor  # noqa: PLC0415 - an extra
    from parsl.providers import LocalProvider  # noqa: PLC0415 - an extra

    scripts = Path(sys.executable).parent  # Parsl's own scripts, without an activated environment
    setup = f'export PATH={shlex.quote(str(scripts))}:"$PATH"\n{shell_leash(os.getpid())}'
    make_provider: Any = LocalProvider  # Parsl does not say its type
    provider = make_provider(init_blocks=1, min_blocks=1, max_blocks=1, worker_init=setup)
    executor = HighThroughputExecutor(
        label="htex_local",
        address="127.0.0.1",
        loopback_address="127.0.0.1",
        cores_per_worker=1e-6,
        max_workers_per_node=workers,
        encrypted=True,  # loopback is open to every user of the machine
        heartbeat_period=_HEARTBEAT_S,
        heartbeat_threshold=_SILENCE_S,
        interchange_launch_cmd=[sys.executable, "-m", exit_with_parent.__name__, _INTERCHANGE],
        worker_logdir_root=str(folder),
        provider=provider,
    )
    return Config(executors=[executor], **_quiet(folder))


def htex_job(nodes: JobNodes, folder: Path) -> Any:
    """Return a ``parsl.Config`` of one worker on each node of the job, encrypted.

    Nothing outlives the coordinator: the launcher is told to end its managers, and a manager that
    hears of no interchange ends by itself within a minute.

    Args:
        nodes: The job's nodes.
        folder: For Parsl's own files, keys and logs of the managers among them; all nodes reach it.

    Raises:
        ConfigurationError: The host cannot be resolved.
    """
    from parsl.config import Config  # noqa: PLC0415 - an extra
    from parsl.executors import HighThroughputExecutor  # noqa: PLC0415 - an extra
    from parsl.executors.high_throughput.executor import (  # noqa: PLC0415 - an extra
        DEFAULT_LAUNCH_CMD,
    )
    from parsl.launchers import WrappedLauncher  # noqa: PLC0415 - an extra
    from parsl.providers import LocalProvider  # noqa: PLC0415 - an extra

    make_provider: Any = LocalProvider  # Parsl does not say its type
    provider = make_provider(
        init_blocks=1,
        min_blocks=1,
        max_blocks=1,
        launcher=WrappedLauncher(prepend=shlex.join(nodes.launcher), debug=False),
        worker_init=launcher_leash(os.getpid()),
    )
    # not by PATH: nodes may have a Python of their own, and a script names the one of its making
    pool = f"{shlex.join(nodes.python)} -m {_POOL}"
    executor = HighThroughputExecutor(
        label="htex_job",
        address=_address(nodes.host),
        loopback_address="127.0.0.1",
        cores_per_worker=1e-6,
        max_workers_per_node=1,
        encrypted=True,
        heartbeat_period=_JOB_HEARTBEAT_S,
        heartbeat_threshold=_JOB_SILENCE_S,
        launch_cmd=DEFAULT_LAUNCH_CMD.replace(_POOL_SCRIPT, pool, 1),
        interchange_launch_cmd=[sys.executable, "-m", exit_with_parent.__name__, _INTERCHANGE],
        worker_logdir_root=str(folder),
        provider=provider,
    )
    return Config(executors=[executor], **_quiet(folder))


def _quiet(folder: Path) -> dict[str, Any]:
    """Return what both have in common: one block, no retries, nothing told to anybody."""
    return {
        "strategy": "none",
        "strategy_period": 1,
        "retries": 0,
        "usage_tracking": 0,
        "run_dir": str(folder),
        "initialize_logging": False,
    }


def _address(host: str) -> str:
    """Return the address of this machine to which the interchange is bound.

    Raises:
        ConfigurationError: There is none.
    """
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        msg = f"backend.host: {host!r} has no address: {error.strerror}"
        raise ConfigurationError(msg) from error
