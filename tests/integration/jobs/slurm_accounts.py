"""Accounts for a private Slurm: slurmdbd with its own database in MariaDB."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONF = """\
AuthType=auth/none
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=3306
StorageUser=root
StorageLoc={database}
LogFile={folder}/accounts.log
PidFile={folder}/accounts.process
"""
USED_BY = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
JobAcctGatherType=jobacct_gather/none
"""


def no_accounts() -> str | None:
    """Say why a private Slurm can keep no accounts here, or None."""
    absent = [p for p in ("slurmdbd", "sacct", "mysql") if shutil.which(p) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurmdbd, mariadb-client)"
    asked = subprocess.run([*MYSQL, "select 1"], capture_output=True, text=True, check=False)
    return f"no MariaDB for root without a password: {asked.stderr}" if asked.returncode else None


MYSQL = ("mysql", "--host=127.0.0.1", "--user=root", "--execute")


@contextmanager
def accounts(folder: Path, port: int, environment: dict[str, str]) -> Iterator[str]:
    """Keep accounts while the block runs; yields the lines that slurm.conf needs.

    The block writes slurm.conf into the same folder before it uses them: slurmdbd reads it.
    """
    database = f"fanfold_test_{os.getpid()}_{port}"
    conf = folder / "slurmdbd.conf"
    host = socket.gethostname()
    conf.write_text(CONF.format(host=host, port=port, folder=folder, database=database))
    conf.chmod(0o600)
    try:
        subprocess.run(["slurmdbd"], check=True, env=environment)
        _until_it_listens(port)
        yield USED_BY.format(port=port)
    finally:
        _end(folder / "accounts.process")
        subprocess.run([*MYSQL, f"drop database if exists {database}"], check=True)


def _until_it_listens(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < end, "slurmdbd does not come up"
            time.sleep(0.1)
        else:
            return


def _end(file: Path) -> None:
    pid = int(file.read_text())
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "slurmdbd does not end"
        time.sleep(0.1)
