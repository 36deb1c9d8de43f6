"""Checkpoint savers: SQLite in the run folder, or PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiosqlite
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from ...backends.core.errors import ConfigurationError, JournalError, MissingExtraError

logger = logging.getLogger(__name__)

NETWORK_FILE_SYSTEMS: Final = frozenset(
    {
        *("lustre", "nfs", "nfs4", "gpfs", "beegfs", "dvs", "panfs", "pvfs2", "orangefs"),
        *("cifs", "smb3", "smbfs", "ceph", "wekafs", "afs", "9p", "virtiofs", "gfs2", "ocfs2"),
    }
)
_LOCAL_FUSE: Final = frozenset({"fuse.fuse-overlayfs", "fuseblk"})
_BUSY_S: Final = 60.0
"""Wait this long for another connection's write to end; a slow disk may take seconds."""
_MOUNTS: Final = Path("/proc/self/mountinfo")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_PLAIN_URL: Final = re.compile(r"\w+://([^/?#@]*@)?[^/?#@]+([/?#][^@]*)?")
_CONNECT_S: Final = 10


@asynccontextmanager
async def open_saver(url: str | None, file: Path) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    """Open the checkpoint saver of a run.

    Args:
        url: ``postgresql://…``, or None for SQLite.
        file: The SQLite file.

    Raises:
        ConfigurationError: The URL is of another kind, or the database cannot be reached.
        MissingExtraError: PostgreSQL without the extra ``postgres``.
        JournalError: A checkpoint cannot be written or read.
    """
    if url is None:
        async with _open_sqlite(file, is_network(file)) as saver:
            yield saver
    elif url.partition(":")[0] in ("postgresql", "postgres"):
        async with _open_postgres(url) as saver:
            yield saver
    else:
        scheme = url.partition("://")[0] if "://" in url else "no scheme"
        msg = f"--checkpointer: expected postgresql://USER@HOST/DATABASE, found {scheme}"
        raise ConfigurationError(msg)


async def check_saver(url: str | None) -> None:
    """Check that a ``--checkpointer`` can be used, before anything is written.

    Args:
        url: ``postgresql://…``, or None for SQLite, which needs no check.

    Raises:
        ConfigurationError: The URL is of another kind, or the database cannot be reached.
        MissingExtraError: PostgreSQL without the extra ``postgres``.
        JournalError: The database can be reached, but not used.
    """
    if url is not None:
        async with open_saver(url, Path()):
            return


@asynccontextmanager
async def _open_sqlite(file: Path, network: bool) -> AsyncIterator[AsyncSqliteSaver]:
    """Open SQLite; on a network file system use a rollback journal instead of WAL.

    WAL needs memory shared by all users of the file, which network file systems do not provide
    (sqlite.org/wal.html). In exclusive locking mode SQLite uses private memory instead, so it is
    safe that the saver first switches to WAL.
    """
    try:
        # SQLite would create the file without group write access; it reports why it cannot write
        with suppress(OSError):
            await asyncio.to_thread(file.touch)
        async with aiosqlite.connect(file, timeout=_BUSY_S) as connection:
            saver = AsyncSqliteSaver(connection)
            if network:
                logger.info("%s: network file system, using a rollback journal", file)
                await connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            await saver.setup()
            if network:
                await connection.execute("PRAGMA journal_mode=DELETE")
            yield saver
    except sqlite3.Error as error:
        msg = (
            f"{file}: the checkpoints cannot be written or read: {error} (the journal holds the "
            "items: if the file is damaged, delete it; if this file system has no locks, use "
            "--checkpointer postgresql://…)"
        )
        raise JournalError(msg) from error


def is_network(path: Path, mounts: str | None = None) -> bool:
    """Return True if a path is on a network file system, by the mount table (Linux).

    Args:
        path: The path, which need not exist.
        mounts: Text of ``/proc/self/mountinfo`` (proc(5)); None reads it if it exists.
    """
    if mounts is None:
        mounts = _MOUNTS.read_text(errors="replace") if _MOUNTS.exists() else ""
    best, kind = "", ""
    full_path = str(path.resolve())
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5:  # noqa: PLR2004 - the mount point is the fifth field
            continue
        point = _OCTAL.sub(lambda code: chr(int(code.group(1), 8)), fields[4])
        below = full_path == point or full_path.startswith(point.rstrip("/") + "/")
        if below and len(point) >= len(best):  # of two mounts on one point the later one is visible
            best, kind = point, right.split(" ")[0]
    return kind in NETWORK_FILE_SYSTEMS or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)


@asynccontextmanager
async def _open_postgres(url: str) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    try:
        import psycopg  # noqa: PLC0415 - an extra
        from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver  # noqa: PLC0415 - an extra
        from psycopg.rows import dict_row  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("--checkpointer postgresql://…", "postgres") from error
    host = _host(url)
    try:
        connection = await psycopg.AsyncConnection.connect(
            url,
            autocommit=True,
            prepare_threshold=0,
            row_factory=dict_row,
            connect_timeout=_CONNECT_S,
        )
    except psycopg.OperationalError as error:
        reason = str(error).strip().splitlines()[0]
        msg = f"--checkpointer: PostgreSQL at {host} cannot be reached: {reason}"
        raise ConfigurationError(msg) from None
    except psycopg.Error:  # its text may show the URL, and with it a password
        msg = f"--checkpointer: PostgreSQL at {host}: unknown part in the URL"
        raise ConfigurationError(msg) from None
    try:
        async with connection:
            saver = AsyncPostgresSaver(connection)
            await saver.setup()
            yield saver
    except psycopg.Error as error:
        reason = str(error).strip() or type(error).__name__
        msg = f"--checkpointer: PostgreSQL at {host}: checkpoints cannot be written: {reason}"
        raise JournalError(msg) from error


def _host(url: str) -> str:
    """Return the host for messages; a driver's message could show a password in a wrong URL."""
    try:
        host = urlsplit(url).hostname if _PLAIN_URL.fullmatch(url) else None
    except ValueError:
        host = None
    if host is None:
        msg = (
            "--checkpointer: not a valid URL; expected postgresql://USER@HOST:PORT/DATABASE, "
            "with / ? # @ in a password written as %2F %3F %23 %40"
        )
        raise ConfigurationError(msg)
    return host
