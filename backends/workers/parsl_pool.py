"""Parsl's pools in the hands of others: how they end, and when they are of no use any more.

Parsl cannot cancel a task: its pool warns of that and waits, for blocks that are still in a queue,
too. It loads one DataFlowKernel per process, and keeps it when that has ended.
"""

from __future__ import annotations

import sys
from concurrent.futures import Executor
from typing import Any


def is_parsl(executor: Executor) -> bool:
    """Say whether an executor is a pool of Parsl's."""
    module = sys.modules.get("parsl.concurrent")
    return module is not None and isinstance(executor, module.ParslPoolExecutor)


def end(executor: Executor) -> None:
    """End a pool of Parsl's and what it loaded, whatever it still works on; blocks."""
    import parsl  # noqa: PLC0415 - an extra

    kernel: Any = getattr(executor, "_dfk", None)
    executor.shutdown(wait=False)
    if kernel is not None and kernel.cleanup_called and _loaded() is kernel:
        parsl.clear()


def _loaded() -> Any:
    import parsl  # noqa: PLC0415 - an extra
    from parsl.errors import NoDataFlowKernelError  # noqa: PLC0415 - an extra

    try:
        return parsl.dfk()
    except NoDataFlowKernelError:
        return None


def is_fatal(error: BaseException | None) -> bool:
    """Say whether an error means that a pool of Parsl's is dead: it never mends itself."""
    if error is None or "parsl.concurrent" not in sys.modules:
        return False
    from parsl.executors.errors import ExecutorError  # noqa: PLC0415 - an extra
    from parsl.jobs.errors import TooManyJobFailuresError  # noqa: PLC0415 - an extra

    return isinstance(error, ExecutorError | TooManyJobFailuresError)
