"""Run shards on Parsl, with the configurations that fanfold provides."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from ..core import exit_with_parent
from ..core.errors import BackendError, ConfigurationError, FanfoldError, MissingExtraError
from ..core.exit_with_parent import launcher_exit_with_parent, shell_exit_with_parent
from ..core.process import TemporaryFolder
from .executor import ExecutorBackend, WorkShard

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
        launcher: Command that starts one program on each node; empty if unknown.
        python: Command that starts Python there.
        host: Name or address by which the nodes reach this machine.
        folder: A folder that all nodes reach; None is the system's temporary one.
    """

    launcher: Sequence[str]
    python: Sequence[str]
    host: str
    folder: Path | None


def htex_local(workers: int, folder: Path) -> Any:
    """Return a ``parsl.Config`` of one pool of worker processes on this machine's loopback.

    Neither the interchange nor the workers outlive the coordinator, even if it is killed.

    Args:
        workers: Number of worker processes.
        folder: Folder for Parsl's own files.
    """
    from parsl.config import Config  # noqa: PLC0415 - an extra
    from parsl.executors import HighThroughputExecutor  # noqa: PLC0415 - an extra
    from parsl.providers import LocalProvider  # noqa: PLC0415 - an extra

    scripts = Path(sys.executable).parent  # Parsl's own scripts, without an activated environment
    setup = (
        f'export PATH={shlex.quote(str(scripts))}:"$PATH"\n{shell_exit_with_parent(os.getpid())}'
    )
    make_provider: Any = LocalProvider  # not typed in Parsl
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
    return Config(executors=[executor], **_common_options(folder))


def htex_job(nodes: JobNodes, folder: Path) -> Any:
    """Return a ``parsl.Config`` of one worker on each node of the job, encrypted.

    No process outlives the coordinator: the launcher stops its managers, and a manager that loses
    the interchange exits within a minute.

    Args:
        nodes: The job's nodes.
        folder: Folder for Parsl's files, including keys and manager logs; all nodes reach it.

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

    make_provider: Any = LocalProvider  # not typed in Parsl
    provider = make_provider(
        init_blocks=1,
        min_blocks=1,
        max_blocks=1,
        launcher=WrappedLauncher(prepend=shlex.join(nodes.launcher), debug=False),
        worker_init=launcher_exit_with_parent(os.getpid()),
    )
    # not by PATH: nodes may have another Python, and scripts name the one that installed them
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
    return Config(executors=[executor], **_common_options(folder))


def _common_options(folder: Path) -> dict[str, Any]:
    """Return the options of both: one block, no retries, no usage tracking."""
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
        ConfigurationError: The name has no address.
    """
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        msg = f"backend.host: {host!r} has no address: {error.strerror}"
        raise ConfigurationError(msg) from error


class ParslBackend(ExecutorBackend):
    """Run shards on Parsl.

    Parsl can neither cancel a task nor repair an executor whose blocks have ended: such an executor
    is discarded with its DataFlowKernel, and a new one is made.

    Args:
        config: ``htex_local``, ``htex_job``, ``loaded``, or ``module:attr``: a ``parsl.Config`` or
            a function that makes one.
        work: The function that runs a shard.
        workers: Shards that run at a time.
        nodes: (htex_job) The job's nodes.

    Raises:
        MissingExtraError: Parsl is not installed.
        ConfigurationError: The command that starts a program on the job's nodes is unknown.
    """

    def __init__(
        self, config: str, work: WorkShard, workers: int, nodes: JobNodes | None = None
    ) -> None:
        if find_spec("parsl") is None:
            raise MissingExtraError("backend.kind: parsl", "parsl")
        if config == "htex_job" and (nodes is None or not nodes.launcher):
            msg = (
                "backend.config: htex_job runs inside a batch job, but no command is set that "
                "starts programs on its nodes; use fanfold submit, or set backend.command (mpiexec "
                "-n {workers} --ppn 1, srun …); on one machine use htex_local"
            )
            raise ConfigurationError(msg)
        super().__init__(self._make_pool, work, workers, f"parsl ({config})")
        self._config, self._nodes = config, nodes
        self._temporary_folders = dict[Executor, TemporaryFolder | None]()

    def _make_pool(self) -> Executor:
        """Make the executor over a new DataFlowKernel; blocks."""
        # an extra, and it takes a second to import
        from parsl.concurrent import ParslPoolExecutor  # noqa: PLC0415

        if self._config == "loaded":
            return ParslPoolExecutor(dfk=self._check_kernel(_require_loaded_kernel()))
        # not parsl.load(): the one global kernel is the user's
        from parsl.dataflow.dflow import DataFlowKernel  # noqa: PLC0415

        temporary: TemporaryFolder | None = None
        if self._config == "htex_local":
            temporary = TemporaryFolder("parsl")
            config = htex_local(self._workers, temporary.path)
        elif self._config == "htex_job" and self._nodes is not None:
            temporary = TemporaryFolder("parsl", self._nodes.folder)
            config = htex_job(self._nodes, temporary.path)
        else:
            config = self._load_user_config(*self._config.split(":"))
        try:
            executor: Executor = ParslPoolExecutor(dfk=DataFlowKernel(config))
            self._temporary_folders[executor] = temporary
            return executor
        except Exception as error:
            if temporary is not None:
                temporary.remove()
            raise self._start_error(error) from error

    def _start_error(self, error: Exception) -> FanfoldError:
        message = f"{self.name}: cannot be started: {error}"
        if isinstance(error, FileNotFoundError) and "/" not in str(error.filename):
            scripts = sysconfig.get_path("scripts")
            advice = f'activate the environment, or export PATH="{scripts}:$PATH"'
            return ConfigurationError(f"{message}: Parsl searches PATH for it; {advice}")
        return BackendError(message)

    def _check_kernel(self, kernel: Any) -> Any:
        """Return the user's DataFlowKernel unless it has ended; a new one is the user's to make.

        Raises:
            BackendError: It has ended.
        """
        if _has_ended(kernel):
            msg = (
                f"{self.name}: the DataFlowKernel has no workers left and gets no new ones; load "
                "another one (parsl.clear(), parsl.load(...)) and resume the run"
            )
            raise BackendError(msg)
        return kernel

    def _load_user_config(self, module: str, attribute: str) -> Any:
        """Return a new copy of the user's Config each time: Parsl starts a Config only once.

        Raises:
            ConfigurationError: It cannot be found or is no Config.
        """
        from parsl.config import Config  # noqa: PLC0415 - an extra

        spec = find_spec(module)
        if spec is None or spec.loader is None:
            raise ConfigurationError(
                f"backend.config: no module {module} (add its folder to PYTHONPATH)"
            )
        try:
            found: Any = _reload_module(spec, spec.loader)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(f"backend.config: {self._config}: {error}") from error
        config = found() if callable(found) else found
        if not isinstance(config, Config):
            msg = f"backend.config: {self._config} is {type(config).__name__}, not a parsl.Config"
            raise ConfigurationError(msg)
        return config

    def capacity(self) -> int:
        """Return the number of workers; 0 once all blocks have ended for good."""
        kernel = getattr(self._executor, "_dfk", None)
        return 0 if kernel is None or _has_ended(kernel) else super().capacity()

    def shutdown(self, executor: Executor) -> None:
        """End the DataFlowKernel unless it is the user's; blocks."""
        kernel: Any = getattr(executor, "_dfk", None)
        if self._config == "loaded" or kernel is None or kernel.cleanup_called:
            return
        kernel.cleanup()
        if (temporary := self._temporary_folders.pop(executor, None)) is not None:
            temporary.remove()


def _reload_module(spec: ModuleSpec, loader: Loader) -> ModuleType:
    """Return a freshly executed module; earlier imports keep theirs."""
    fresh, name = module_from_spec(spec), spec.name
    kept = sys.modules.get(name)
    sys.modules[name] = fresh  # dataclasses look up their module, for example
    try:
        loader.exec_module(fresh)
    finally:
        if kept is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = kept
    return fresh


def _require_loaded_kernel() -> Any:
    import parsl  # noqa: PLC0415 - an extra
    from parsl.errors import NoDataFlowKernelError  # noqa: PLC0415 - an extra

    try:
        return parsl.dfk()
    except NoDataFlowKernelError:
        msg = (
            "backend.config: loaded, but no DataFlowKernel is loaded in this process; call "
            "parsl.load(...) before, or name a Config as module:attr"
        )
        raise ConfigurationError(msg) from None


def _has_ended(kernel: Any) -> bool:
    """Return True if all blocks have ended and no strategy starts new ones."""
    if kernel.cleanup_called:
        return True
    bad = [getattr(executor, "bad_state_is_set", None) for executor in kernel.executors.values()]
    if True in bad and False not in bad:  # all that have blocks; Parsl repairs none
        return True
    if kernel.config.strategy not in (None, "none"):
        return False
    blocks = [
        status
        for executor in kernel.executors.values()
        for status in getattr(executor, "status_facade", {}).values()
    ]
    return bool(blocks) and all(status.terminal for status in blocks)
