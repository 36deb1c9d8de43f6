"""A separate process that submits tasks: `python -m ... MODE ENDPOINT TASKS SECONDS`.

The service's URL comes by the environment. `wait` prints the task group, then the number of each
result; it is there to be killed. `leave` closes the executor while tasks are open and must end by
itself.
"""

# mypy: allow-untyped-calls
# (the SDK annotates only part of itself)

from __future__ import annotations

import sys
import time

from fanfold.tests.integration.workers.globus.client import (
    client_from_environment,
    close_executor,
    make_executor,
)
from fanfold.tests.integration.workers.globus.work import slow

POSTED_S = 30.0


def main(mode: str, endpoint_id: str, tasks: str, seconds: str) -> None:
    """Submit the tasks and wait for them, or leave them."""
    executor = make_executor(client_from_environment(), endpoint_id)
    futures = [executor.submit(slow, number, float(seconds)) for number in range(int(tasks))]
    deadline = time.monotonic() + POSTED_S
    while any(future.task_id is None for future in futures):
        if time.monotonic() > deadline:
            raise TimeoutError("the tasks were not posted")
        time.sleep(0.02)
    print(executor.task_group_id, flush=True)
    if mode == "leave":
        close_executor(executor)
        print([future.cancelled() for future in futures], flush=True)
        return
    for future in futures:
        print(future.result(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
