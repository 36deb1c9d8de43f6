"""A user's executors, on which agents are launched."""

from __future__ import annotations

import os
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from parsl.concurrent import ParslPoolExecutor

from fanfold.backends.workers.parsl import htex_local

FOLDER = "FANFOLD_TEST_PARSL_FOLDER"
PARSL = f"{__name__}:parsl_pool"
PROCESSES = f"{__name__}:process_pool"


def parsl_pool() -> Executor:
    """Make an executor of two high-throughput workers, with its files where the test wants them."""
    return ParslPoolExecutor(htex_local(2, Path(os.environ[FOLDER])))


def process_pool() -> Executor:
    """Make a pool of two processes, which breaks when one of them dies."""
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))
