"""A private Slurm on loopback: one controller and several nodes, all on this machine, as root."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..servers.conftest import free_port
from .slurm_accounts import accounts
from .standin_pbs import members

NODES = 3
CONF = """\
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
ReturnToService=2
SlurmdTimeout=10
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
{accounts}{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Say why there can be no Slurm here, or None."""
    if os.environ.get("FANFOLD_TEST_SLURM") != "1":
        return "set FANFOLD_TEST_SLURM=1 to run these minutes on a Slurm of their own"
    if os.getuid() != 0:
        return "slurmctld and slurmd are started as root here"
    absent = [p for p in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(p) is None]
    return f"no {', '.join(absent)} (Debian: slurm-wlm)" if absent else None


class PrivateSlurm:
    """The running cluster; its nodes are called n1 to n3."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"

    def start(self, accounts: str = "") -> None:
        """Start it; ``accounts`` are the lines of slurm.conf that say who keeps them."""
        host, ports = socket.gethostname(), [free_port() for _ in range(NODES + 1)]
        nodes = "\n".join(
            f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]} CPUs=1"
            for n in range(1, NODES + 1)
        )
        for name in ("state", *(f"spool-n{n}" for n in range(1, NODES + 1))):
            (self.folder / name).mkdir(parents=True)
        values = {"host": host, "port": ports[0], "folder": self.folder}
        self.conf.write_text(CONF.format(**values, nodes=nodes, accounts=accounts))
        if accounts:
            self.said("sacctmgr", "--immediate", "add", "cluster", "trial")
        subprocess.run(["slurmctld", "-c"], check=True, env=self.environment)
        for n in range(1, NODES + 1):
            subprocess.run(["slurmd", "-N", f"n{n}"], check=True, env=self.environment)
        end = time.monotonic() + 60
        while self.said("sinfo", "-h", "-t", "idle", "-o", "%D").strip() != str(NODES):
            assert time.monotonic() < end, "the nodes do not come up"
            time.sleep(0.2)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.conf)}

    def said(self, *command: str) -> str:
        return subprocess.run(
            command, check=True, env=self.environment, capture_output=True, text=True
        ).stdout

    def lose(self, node: str) -> None:
        """End a node at once: its daemon and everything that runs there."""
        daemon = int((self.folder / f"{node}.pid").read_text())
        os.kill(daemon, signal.SIGKILL)
        for pid in self.processes(node):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def processes(self, node: str) -> list[int]:
        """Return what runs on a node, and the daemons that started it."""
        found, mine = set(), {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.conf}"}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                names = set((folder / "environ").read_text(errors="replace").split("\0"))
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if mine <= names:
                found.add(int(folder.name))
                if b"slurmstepd" in _command(parent):
                    found.add(parent)
        return sorted(found)

    def stop(self) -> None:
        for job in self.said("squeue", "-h", "-o", "%i").split():
            subprocess.run(["scancel", job], check=False, env=self.environment)
        end = time.monotonic() + 30
        while self.said("squeue", "-h", "-o", "%i").split() and time.monotonic() < end:
            time.sleep(0.2)
        for file in self.folder.glob("*.pid"):
            pid = int(file.read_text())
            if members(pid) or Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGTERM)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def private_slurm(folder: Path, *, keeps_accounts: bool = False) -> Iterator[PrivateSlurm]:
    """Start a Slurm in a folder; it ends with the block."""
    cluster = PrivateSlurm(folder)
    with ExitStack() as stack:
        lines = ""
        if keeps_accounts:
            folder.mkdir()
            lines = stack.enter_context(accounts(folder, free_port(), cluster.environment))
        stack.callback(cluster.stop)
        cluster.start(lines)
        yield cluster
