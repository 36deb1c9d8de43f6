"""Where checkpoints are kept: SQLite in the run folder, or PostgreSQL."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiosqlite
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from ..backends.contract.errors import ConfigurationError, MissingExtraError

logger = logging.getLogger(__name__)

NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"lustre", "nfs", "nfs4", "gpfs", "beegfs", "cifs", "smb3", "ceph", "pvfs2", "wekafs", "9p"}
)
_MOUNTS: Final = Path("/proc/self/mountinfo")


@asynccontextmanager
async def open_saver(url: str | None, file: Path) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    """Open the saver of a run.

    Args:
        url: ``postgresql://…``, or None for SQLite.
        file: The SQLite file.

    Raises:
        ConfigurationError: Another kind of URL, or the database cannot be reached.
        MissingExtraError: PostgreSQL without the extra ``postgres``.
    """
    if url is None:
        async with _sqlite(file, is_network(file)) as saver:
            yield saver
    elif urlsplit(url).scheme in ("postgresql", "postgres"):
        async with _postgres(url) as saver:
            yield saver
    else:
        scheme = urlsplit(url).scheme or "no scheme"
        msg = f"--checkpointer: expected postgresql://USER@HOST/DATABASE, found {scheme}"
        raise ConfigurationError(msg)


@asynccontextmanager
async def _sqlite(file: Path, network: bool) -> AsyncIterator[AsyncSqliteSaver]:
    """Open SQLite, on a network file system with a rollback journal in place of WAL.

    WAL needs memory shared by all users of the file, which network file systems do not offer
    (sqlite.org/wal.html). In exclusive locking mode SQLite keeps that memory to itself, so the
    saver's own switch to WAL does no harm before it is undone.
    """
    async with aiosqlite.connect(file) as connection:
        saver = AsyncSqliteSaver(connection)
        if network:
            logger.info("%s: network file system, using a rollback journal", file)
            await connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        await saver.setup()
        if network:
            await connection.execute("PRAGMA journal_mode=DELETE")
        yield saver


def is_network(path: Path, mounts: str | None = None) -> bool:
    """Say whether a path lies on a network file system, by the mount table (Linux).

    Args:
        path: The path; it need not exist.
        mounts: Text of ``/proc/self/mountinfo`` (proc(5)); read if None, where there is one.
    """
    if mounts is None:
        mounts = _MOUNTS.read_text() if _MOUNTS.exists() else ""
    best, kind = "", ""
    place = str(path.resolve())
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].replace("\\040", " ")
        below = place == point or place.startswith(point.rstrip("/") + "/")
        if below and len(point) >= len(best):
            best, kind = point, right.split(" ")[0]
    return kind in NETWORK_FILE_SYSTEMS or kind.startswith("fuse.sshfs")


@asynccontextmanager
async def _postgres(url: str) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    try:
        from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver  # noqa: PLC0415 - an extra
        from psycopg import OperationalError  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("--checkpointer postgresql://…", "postgres") from error
    opened = AsyncPostgresSaver.from_conn_string(url)
    try:
        saver = await opened.__aenter__()
    except OperationalError as error:
        reason = str(error).strip().splitlines()[-1]
        host = urlsplit(url).hostname
        msg = f"--checkpointer: PostgreSQL at {host} cannot be reached: {reason}"
        raise ConfigurationError(msg) from None
    try:
        await saver.setup()
        yield saver
    finally:
        await opened.__aexit__(None, None, None)
