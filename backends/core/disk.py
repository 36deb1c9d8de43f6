"""Make files durable."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

_NO_FOLDER_SYNC: Final = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})
"""Errors of file systems that flush folders automatically, or not at all."""


def sync_folder(path: Path) -> None:
    """Make the names of the files in a folder as durable as their content; blocks.

    Raises:
        OSError: The disk reported an error.
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(folder)
