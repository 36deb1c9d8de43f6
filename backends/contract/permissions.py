"""Who besides this user can change a file: what others can write is not trusted."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path


def untrusted_reason(path: Path) -> str | None:
    """Return why the content of a file may be somebody else's, or None.

    The file and its folder count, and for a link also what it names and the folder of that.

    Args:
        path: A file or a folder.

    Raises:
        OSError: It cannot be looked at.
    """
    real = path.resolve(strict=True)
    reason = file_reason(real, real.stat())
    for folder in dict.fromkeys((path.absolute().parent, real.parent)):
        reason = reason or folder_reason(folder, folder.stat())
    return reason


def file_reason(path: Path, status: os.stat_result) -> str | None:
    """Return why others can change a file itself, or None.

    Args:
        path: The file, for the message.
        status: What ``stat`` says of it.
    """
    if status.st_uid not in {os.geteuid(), 0}:
        return f"{path} belongs to {_user(status.st_uid)} (put a copy of your own in its place)"
    return _writable(path, status)


def folder_reason(path: Path, status: os.stat_result) -> str | None:
    """Return why others can put their own files in the place of a folder's, or None.

    Args:
        path: The folder, for the message.
        status: What ``stat`` says of it.
    """
    if status.st_uid not in {os.geteuid(), 0}:
        return f"the folder {path} belongs to {_user(status.st_uid)} (use a folder of your own)"
    return None if status.st_mode & stat.S_ISVTX else _writable(path, status)


def _writable(path: Path, status: os.stat_result) -> str | None:
    mode = status.st_mode
    if mode & stat.S_IWOTH:
        return f"everyone can write {path} (chmod go-w {path})"
    if mode & stat.S_IWGRP and not _is_private(status):
        return f"the group {_group(status.st_gid)} can write {path} (chmod go-w {path})"
    return None


def _is_private(status: os.stat_result) -> bool:
    """Say whether a file's group has no member but this user, as many systems give each user."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    own = status.st_gid == user.pw_gid and group.gr_name == user.pw_name
    return own and not set(group.gr_mem) - {user.pw_name}


def _user(uid: int) -> str:
    with suppress(KeyError):
        return f"the user {pwd.getpwuid(uid).pw_name}"
    return f"the user {uid}"


def _group(gid: int) -> str:
    with suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)
