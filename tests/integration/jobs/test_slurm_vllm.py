"""A chain of jobs on a real Slurm whose nodes serve a real vLLM; minutes, by hand.

``FANFOLD_TEST_SLURM=1`` and ``FANFOLD_TEST_VLLM_SERVE="…/vllm serve MODEL --port {port}
--served-model-name {model} --max-num-seqs 64 …"``, without ``--host``: all nodes are one machine.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.storage.run_folder import RunFolder
from fanfold.graphs.jobs.usage import job_report

from .conftest import Cluster, ended, served, until
from .slurm import PrivateSlurm, missing

SERVE = os.environ.get("FANFOLD_TEST_VLLM_SERVE")
NODE = """\
#!/bin/bash
exec "$@" --host "127.0.0.$((1 + ${SLURMD_NODENAME#n}))"
"""

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.skipif(SERVE is None, reason="FANFOLD_TEST_VLLM_SERVE names no command of a vLLM"),
]


def test_a_chain_on_real_servers(jobs: Cluster, slurm: PrivateSlurm, tmp_path: Path) -> None:
    """The walltime cuts it at least once; at the end each item has ended once.

    The model is noise: a number that it goes on with beyond its tokens is a failure.
    """
    items = int(os.environ.get("FANFOLD_TEST_VLLM_ITEMS", "10000"))
    node = tmp_path / "node.sh"
    node.write_text(NODE)
    settings: dict[str, Any] = served(0.0)
    settings["node"] |= {"serve": f"bash {node} {SERVE}", "timeout_s": 600}
    settings["model"] |= {"max_tokens": 48, "temperature": 1.0}
    settings["limits"] = {"streams": 160, "drain_s": 15}
    settings["endpoints"] |= {"least": 2, "wait_s": 600}
    trial = jobs.submit(items, settings, walltime="3m")
    until(lambda: ended(trial), "the end of the chain", 3600)
    facts = job_report(trial.path, utilization=True)
    print(facts)
    files = RunFolder(trial.path).journal.glob("*.jsonl")
    lines = [orjson.loads(line) for file in files for line in file.read_bytes().splitlines()]
    records = [line for line in lines if "index" in line]
    assert Counter(record["index"] for record in records) == Counter(range(items))
    assert trial.chain.halt_reason == "all items are finished", trial.logs()
    assert {record["error_class"] for record in records} <= {None, "TruncatedAnswerError"}
    assert facts is not None
    assert facts["useful"]["jobs_without_counts"] == 0
    until(lambda: slurm.said("squeue", "-h") == "", "the end of the last job")
    assert len(trial.chain.jobs) > 1
