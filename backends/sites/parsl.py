"""Shards on Parsl: any Config, a DataFlowKernel that is loaded already, or this machine."""

from __future__ import annotations

import os
import shlex
import sys
from concurrent.futures import Executor
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any, Final

from ..contract.errors import ConfigurationError, MissingExtraError, SiteError
from .executor import ExecutorBackend, WorkShard
from .leash import shell_leash
from .scratch import Scratch

_INTERCHANGE: Final = "parsl.executors.high_throughput.interchange"
_HEARTBEAT_S: Final = 2
_SILENCE_S: Final = 15


class ParslBackend(ExecutorBackend):
    """Runs shards on Parsl.

    Parsl can neither cancel a task nor mend an executor whose blocks have ended: such an
    executor is thrown away with its DataFlowKernel, and a new one is made.

    Args:
        config: ``htex_local``, ``loaded``, or ``module:attr``: a ``parsl.Config`` or a function
            that makes one.
        work: What runs there.
        workers: Shards that it works on at a time.

    Raises:
        MissingExtraError: Parsl is not installed.
    """

    def __init__(self, config: str, work: WorkShard, workers: int) -> None:
        if find_spec("parsl") is None:
            raise MissingExtraError("backend.kind: parsl", "parsl")
        super().__init__(self._kernel, work, workers, f"parsl ({config})")
        self._config = config
        self._scratches = dict[Executor, Scratch | None]()

    def _kernel(self) -> Executor:
        """Make the executor over a DataFlowKernel of its own; blocks."""
        # an extra, and it takes a second to import
        from parsl.concurrent import ParslPoolExecutor  # noqa: PLC0415

        if self._config == "loaded":
            return ParslPoolExecutor(dfk=_loaded())
        # not parsl.load(): the one global kernel is the user's
        from parsl.dataflow.dflow import DataFlowKernel  # noqa: PLC0415

        scratch: Scratch | None = None
        if self._config == "htex_local":
            scratch = Scratch("parsl")
            config = htex_local(self._workers, scratch.path)
        else:
            config = self._users_config(*self._config.split(":"))
        try:
            executor: Executor = ParslPoolExecutor(dfk=DataFlowKernel(config))
            self._scratches[executor] = scratch
            return executor
        except Exception as error:
            if scratch is not None:
                scratch.remove()
            raise SiteError(f"{self.name}: cannot be started: {error}") from error

    def _users_config(self, module: str, attribute: str) -> Any:
        """Return the user's Config: a new one each time, for Parsl starts one only once.

        Raises:
            ConfigurationError: There is none.
        """
        from parsl.config import Config  # noqa: PLC0415 - an extra

        spec = find_spec(module)
        if spec is None or spec.loader is None:
            raise ConfigurationError(f"backend.config: no module {module} (PYTHONPATH names more)")
        fresh = module_from_spec(spec)
        try:
            spec.loader.exec_module(fresh)
            found: Any = fresh
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(f"backend.config: {self._config}: {error}") from error
        config = found() if callable(found) else found
        if not isinstance(config, Config):
            msg = f"backend.config: {self._config} is {type(config).__name__}, no parsl.Config"
            raise ConfigurationError(msg)
        return config

    def capacity(self) -> int:
        """Return the number of workers; none once all blocks have ended for good."""
        kernel = getattr(self._executor, "_dfk", None)
        return 0 if kernel is None or _ended(kernel) else super().capacity()

    def shutdown(self, executor: Executor) -> None:
        """End the DataFlowKernel unless it is the user's; blocks."""
        kernel: Any = getattr(executor, "_dfk", None)
        if self._config == "loaded" or kernel is None or kernel.cleanup_called:
            return
        kernel.cleanup()
        if (scratch := self._scratches.pop(executor, None)) is not None:
            scratch.remove()


def _loaded() -> Any:
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


def _ended(kernel: Any) -> bool:
    """Say whether all blocks have ended and no strategy will start new ones."""
    if kernel.cleanup_called:
        return True
    if kernel.config.strategy not in (None, "none"):
        return False
    blocks = [
        status
        for executor in kernel.executors.values()
        for status in getattr(executor, "status_facade", {}).values()
    ]
    return bool(blocks) and all(status.terminal for status in blocks)


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
        encrypted=False,
        heartbeat_period=_HEARTBEAT_S,
        heartbeat_threshold=_SILENCE_S,
        interchange_launch_cmd=[sys.executable, "-m", f"{__package__}.leash", _INTERCHANGE],
        worker_logdir_root=str(folder),
        provider=provider,
    )
    return Config(
        executors=[executor],
        strategy="none",
        strategy_period=1,
        retries=0,
        usage_tracking=0,
        run_dir=str(folder),
        initialize_logging=False,
    )
