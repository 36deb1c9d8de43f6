"""What the servers of a job said last, where all of them were given up."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_NODES: Final = 3
_BYTES: Final = 8192
_LINES: Final = 20


def last_words(servers: Path, log: Path) -> list[str]:
    """Return why no server was left: by the nodes, or else by the log of what started them.

    Args:
        servers: The servers folder.
        log: What the processes that serve have said; blocks while it is read.
    """
    files = sorted((servers / "logs").glob("*.failed"))
    lines = [line for file in files[:_NODES] for line in _text(file).splitlines()]
    if len(files) > _NODES:
        lines.append(f"… and {len(files) - _NODES:,} more nodes: {servers}/logs/*.failed")
    return lines or [f"from {log}:", *_text(log)[-_BYTES:].splitlines()[-_LINES:]]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"({file} cannot be read: {error.strerror})"
