"""Asking a server whether it is ready: the least of HTTP, so that nothing heavy is imported."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

_OK: Final = range(200, 300)
_LONGEST: Final = 1024


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
        async with asyncio.timeout(timeout_s):
            status = await _status(address, port, path, key)
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        return f"no answer: {reason or error}"
    return None if status in _OK else f"HTTP {status}"


async def _status(address: str, port: int, path: str, key: str | None) -> int:
    reader, writer = await asyncio.open_connection(address, port, limit=_LONGEST)
    try:
        name = f"[{address}]" if ":" in address else address
        lines = [f"GET {path} HTTP/1.1", f"Host: {name}:{port}", "Connection: close"]
        lines += [f"Authorization: Bearer {key}"] if key else []
        writer.write("\r\n".join([*lines, "", ""]).encode())
        first = await reader.readline()
        words = first.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/"):  # noqa: PLR2004 - HTTP/1.1 200
            raise ValueError("no HTTP server listens there")
        return int(words[1])
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


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
