"""Asking a server: the least of HTTP, so that nothing heavy is imported."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

_OK: Final = range(200, 300)
_LONGEST_LINE: Final = 16_384
_MOST: Final = 8 * 1024 * 1024
"""Bytes of an answer that are read; vLLM's metrics take some ten thousand."""


async def look(address: str, port: int, path: str, timeout_s: float, key: str | None) -> str | None:
    """Ask a server whether it is ready.

    Args:
        address: Host name or address.
        port: Port.
        path: What to ask for.
        timeout_s: Longest wait, in seconds.
        key: Key to send, or None.

    Returns:
        None when it answers well; else what is wrong.
    """
    try:
        async with asyncio.timeout(timeout_s), _asked(address, port, path, key) as (status, _):
            pass
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        return f"no answer: {reason or error}"
    return None if status in _OK else f"HTTP {status}"


async def fetch(
    address: str, port: int, path: str, timeout_s: float, key: str | None
) -> tuple[int, bytes] | None:
    """Ask a server for a text.

    Args:
        address: Host name or address.
        port: Port.
        path: What to ask for.
        timeout_s: Longest wait, in seconds.
        key: Key to send, or None.

    Returns:
        The status and the body; None when there is no whole answer.
    """
    try:
        async with asyncio.timeout(timeout_s), _asked(address, port, path, key) as (status, reader):
            return status, await _body(reader)
    except (OSError, ValueError, EOFError):  # too late is an OSError
        return None


@asynccontextmanager
async def _asked(
    address: str, port: int, path: str, key: str | None
) -> AsyncIterator[tuple[int, StreamReader]]:
    """Ask, and yield the answer's status and what follows the first line."""
    reader, writer = await asyncio.open_connection(address, port, limit=_LONGEST_LINE)
    try:
        name = f"[{address}]" if ":" in address else address
        lines = [f"GET {path} HTTP/1.1", f"Host: {name}:{port}", "Connection: close"]
        lines += [f"Authorization: Bearer {key}"] if key else []
        writer.write("\r\n".join([*lines, "", ""]).encode())
        first = await reader.readline()
        words = first.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/"):  # noqa: PLR2004 - HTTP/1.1 200
            raise ValueError("no HTTP server listens there")
        yield int(words[1]), reader
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _body(reader: StreamReader) -> bytes:
    """Return the body of an answer: of a given length, in chunks, or until its end.

    Raises:
        ValueError: It is not HTTP, or too long.
        IncompleteReadError: It is cut off.
    """
    heads = dict[bytes, bytes]()
    while line := (await reader.readline()).strip():
        name, _, value = line.partition(b":")
        heads[name.lower()] = value.strip().lower()
    if heads.get(b"transfer-encoding") == b"chunked":
        return await _chunks(reader)
    length = heads.get(b"content-length")
    return await _read(reader, _MOST if length is None else int(length), whole=length is not None)


async def _chunks(reader: StreamReader) -> bytes:
    parts, left = list[bytes](), _MOST
    while size := int((await reader.readline()).partition(b";")[0], 16):
        parts.append(await _read(reader, size, whole=True, most=left))
        left -= size
        await reader.readline()
    return b"".join(parts)


async def _read(reader: StreamReader, size: int, *, whole: bool, most: int = _MOST) -> bytes:
    if size > most:
        raise ValueError("the answer is too long")
    if whole:
        return await reader.readexactly(size)
    parts = list[bytes]()
    while size > 0 and (part := await reader.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


async def is_taken(address: str, port: int, timeout_s: float) -> bool:
    """Say whether somebody listens on a port."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True
