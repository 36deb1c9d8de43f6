"""Check which other users can change a file: content that others can write is not trusted."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_MOST_LINKS: Final = 40
"""Limit of links on the way to one file, as in Linux."""


def find_path_risk(path: Path) -> str | None:
    """Return why another user may have changed the content of a file, or None.

    Others must not be able to write the file, nor a folder that holds it or a link to it, nor to
    replace a folder or a link on its path: every folder that everyone can write counts, except
    sticky ones such as ``/tmp``. A group that can write a folder further up is trusted.

    Args:
        path: A file or a folder.

    Raises:
        OSError: Its status cannot be read.
    """
    real = path.resolve(strict=True)
    if reason := find_file_risk(real, real.stat()):
        return reason
    for folder, entry, last in _steps(path.absolute()):
        reason = find_folder_risk(folder, folder.stat()) if last else None
        if reason := reason or _find_replaceable(folder, entry):
            return reason
    return None


def _steps(path: Path) -> Iterator[tuple[Path, Path, bool]]:
    """Yield each folder in which the path to a file is resolved, links followed.

    Yields:
        The folder, the entry in it, and whether that is the file or a link to it.
    """
    todo, here, links = list(reversed(path.parts[1:])), Path(path.anchor), 0
    while todo:
        name = todo.pop()
        if name == "..":
            here = here.parent
            continue
        entry = here / name
        yield here, entry, not todo
        if not entry.is_symlink():
            here = entry
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = entry.readlink()
        if target.is_absolute():
            here = Path(target.anchor)
        todo += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def _find_replaceable(folder: Path, entry: Path) -> str | None:
    """Return why everyone, or the owner of a link in a sticky folder, can replace an entry."""
    status = folder.stat()
    if not status.st_mode & stat.S_IWOTH:
        return None
    if not status.st_mode & stat.S_ISVTX:
        return f"everyone can write {folder} (chmod o-w {folder})"
    made = entry.lstat()
    if stat.S_ISLNK(made.st_mode) and made.st_uid not in {os.geteuid(), 0}:
        return f"the link {entry} belongs to {_user(made.st_uid)} (name what it points to)"
    return None


def find_file_risk(path: Path, status: os.stat_result) -> str | None:
    """Return why others can change the file itself, or None.

    Args:
        path: The file, for the message.
        status: Its ``stat`` result.
    """
    if status.st_uid not in {os.geteuid(), 0}:
        return f"{path} belongs to {_user(status.st_uid)} (put a copy of your own in its place)"
    return _find_writable(path, status)


def find_folder_risk(path: Path, status: os.stat_result) -> str | None:
    """Return why others can replace files in a folder, or None.

    Args:
        path: The folder, for the message.
        status: Its ``stat`` result.
    """
    if status.st_uid not in {os.geteuid(), 0}:
        return f"the folder {path} belongs to {_user(status.st_uid)} (use a folder of your own)"
    return None if status.st_mode & stat.S_ISVTX else _find_writable(path, status)


def _find_writable(path: Path, status: os.stat_result) -> str | None:
    mode = status.st_mode
    if mode & stat.S_IWOTH:
        return f"everyone can write {path} (chmod go-w {path})"
    if mode & stat.S_IWGRP and not _is_private(status):
        return f"the group {_group(status.st_gid)} can write {path} (chmod go-w {path})"
    return None


def _is_private(status: os.stat_result) -> bool:
    """Return True if a file's group has only this user as a member, the default on many systems."""
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
