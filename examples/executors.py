"""Executors for ``backend: {kind: executor, factory: executors:on_dask}``.

There is one each for Dask, MPI, Ray and ensemble_launcher.

Copy what you need into your own module on ``PYTHONPATH``. Each function makes an executor for two
workers on this machine; to use a cluster, give Dask's ``Client`` or ``ray.init`` its address.
The engines' own retries are off: fanfold retries lost tasks, and only items without a record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from itertools import count
from socket import gethostname
from tempfile import TemporaryDirectory
from typing import Any

WORKERS = 2


class DaskExecutor(Executor):
    """Dask's executor with its own cluster, which ends with it."""

    def __init__(self) -> None:
        import dask  # noqa: PLC0415 - an optional engine
        from dask.distributed import Client, LocalCluster  # noqa: PLC0415 - an optional engine

        dask.config.set({"distributed.scheduler.allowed-failures": 0})
        self._cluster = LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, dashboard_address=None
        )
        self._client = Client(self._cluster)
        self._executor: Executor = self._client.get_executor(pure=False)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit one call."""
        return self._executor.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """End the calls, the client and the cluster."""
        self._executor.shutdown(wait)
        self._client.close()
        self._cluster.close()


def on_dask() -> Executor:
    """Return Dask's executor; ``pip install 'dask[distributed]'``."""
    return DaskExecutor()


def on_mpi() -> Executor:
    """Return mpi4py's executor; ``mpiexec -n 3 python -m mpi4py.futures -m fanfold run …``.

    Raises:
        RuntimeError: This process was not started that way, so MPI cannot start workers.
    """
    from mpi4py import MPI  # noqa: PLC0415 - an optional engine
    from mpi4py.futures import MPIPoolExecutor  # noqa: PLC0415 - an optional engine

    if MPI.COMM_WORLD.Get_size() == 1:
        start = f"mpiexec -n {WORKERS + 1} python -m mpi4py.futures -m fanfold …"
        raise RuntimeError(f"MPI has one process only; start the run with {start}")
    executor: Executor = MPIPoolExecutor()
    return executor


class RayExecutor(Executor):
    """Ray's tasks as an executor, which Ray itself lacks; ``pip install ray``.

    Args:
        **options: Arguments of ``ray.init``, e.g. ``address="auto"``.
    """

    def __init__(self, **options: Any) -> None:
        import ray  # noqa: PLC0415 - an optional engine

        self._ray = ray
        ray.init(include_dashboard=False, log_to_driver=False, **options)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit one call."""
        future: Future[Any] = self._ray.remote(max_retries=0)(fn).remote(*args, **kwargs).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Disconnect from Ray; a Ray that this process started ends."""
        self._ray.shutdown()


def on_ray() -> Executor:
    """Return an executor on a Ray that this process starts."""
    return RayExecutor(num_cpus=WORKERS, logging_level=logging.WARNING)


class EnsembleExecutor(Executor):
    """ensemble_launcher's cluster mode as an executor: one task for each call, on one node.

    Its orchestrator starts with this executor, and ends with it.

    Args:
        nodes: Names of the nodes; None: this machine.
        system: The orchestrator's name of the machine, ``local`` or e.g. ``aurora``.
    """

    def __init__(self, nodes: list[str] | None = None, system: str = "local") -> None:
        from ensemble_launcher import EnsembleLauncher  # noqa: PLC0415 - an optional engine
        from ensemble_launcher.config import (  # noqa: PLC0415 - an optional engine
            LauncherConfig,
            SystemConfig,
        )
        from ensemble_launcher.orchestrator import ClusterClient  # noqa: PLC0415

        self._folder = TemporaryDirectory(prefix="fanfold-ensemble-")
        self._launcher = EnsembleLauncher(
            ensemble_file={},
            system_config=SystemConfig(name=system, ncpus=WORKERS),
            launcher_config=LauncherConfig(cluster=True, checkpoint_dir=self._folder.name),
            Nodes=nodes or [gethostname()],
        )
        self._launcher.start()
        self._client = ClusterClient(self._folder.name, log_level=logging.WARNING)
        self._client.start()
        self._number = count(1)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit one call."""
        from ensemble_launcher.ensemble import Task  # noqa: PLC0415 - an optional engine

        name = f"shard-{next(self._number)}"
        task = Task(
            task_id=name,
            nnodes=1,
            ppn=1,
            executable=fn,
            args=args,
            kwargs=kwargs,
            serialize_executable_by_value=False,
        )
        future: Future[Any] = self._client.submit(task)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """End the client and the orchestrator."""
        self._client.teardown()
        self._launcher.stop()
        self._folder.cleanup()


def on_ensemble() -> Executor:
    """Return an executor on an ensemble_launcher of this machine."""
    return EnsembleExecutor()
