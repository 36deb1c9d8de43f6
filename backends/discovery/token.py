"""A key that a command prints: fetched when first needed, and again when it is refused."""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable
from typing import Final

from ..core.errors import ConfigurationError, RunStoppedError

_LOG: Final = logging.getLogger(__name__)
_LONGEST: Final = 64 * 1024
"""Bytes that a command may print; a token takes a few thousand."""


class CommandToken:
    """The key of an endpoint, by a command of the user's.

    The command runs beside the loop and without a shell; what it prints is never shown. However
    many calls need the key, it runs once.

    Args:
        command: The command line.
        where: The setting that holds it, for messages.
        timeout_s: Longest time that it may take, in seconds.
        pause_s: A key that is refused within so many seconds of the last refusal is not fetched
            anew: gateways remember refusals for a minute, and a new login is for a person.
        clock: Monotonic time in seconds.

    Raises:
        ConfigurationError: The command line cannot be read.
    """

    def __init__(
        self,
        command: str,
        where: str,
        timeout_s: float = 60.0,
        pause_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            self._command = shlex.split(command)
        except ValueError as error:
            raise ConfigurationError(f"{where}: is no command line: {error}") from None
        if not self._command:
            raise ConfigurationError(f"{where}: is empty")
        self._where = where
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._clock = clock
        self._key: str | None = None
        self._renewed: float | None = None
        self._lock = asyncio.Lock()

    async def __call__(self) -> str:
        """Return the key, running the command for the first call.

        Raises:
            RunStoppedError: The command failed.
        """
        if self._key is not None:
            return self._key
        async with self._lock:
            if self._key is None:
                self._key = await self._fetch()
            return self._key

    async def renew(self, refused: str) -> None:
        """Run the command again after a refusal, unless that was done already.

        Args:
            refused: The key that was refused.

        Raises:
            RunStoppedError: The command failed.
        """
        async with self._lock:
            now = self._clock()
            lately = self._renewed is not None and now - self._renewed < self._pause_s
            if refused != self._key or lately:
                return
            self._renewed = now
            self._key = await self._fetch()
            _LOG.info("%s: the key was refused and has been fetched anew", self._where)

    async def _fetch(self) -> str:
        try:
            child = await asyncio.create_subprocess_exec(
                *self._command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL
            )
        except OSError as error:
            raise self._failed(f"cannot be started: {error.strerror}") from None
        try:
            async with asyncio.timeout(self._timeout_s):
                said = await _read_output(child)
                if said is not None:
                    await child.wait()
        except TimeoutError:
            raise self._failed(f"printed no key within {self._timeout_s:g} s") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if said is None:
            raise self._failed(f"printed more than {_LONGEST:,} bytes")
        if child.returncode:
            raise self._failed(f"failed with exit status {child.returncode}")
        key = said.decode("ascii", "replace").strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise self._failed("printed something else than one key")
        return key

    def _failed(self, problem: str) -> RunStoppedError:
        return RunStoppedError(
            f"{self._where}: the command {self._command[0]!r} {problem}; run it by hand to see "
            "why (a new login may be due)"
        )


async def _read_output(child: asyncio.subprocess.Process) -> bytes | None:
    """Return what a command prints, or None as soon as it is too long for a key."""
    assert child.stdout is not None, "it is a pipe"
    blocks, size = list[bytes](), 0
    while block := await child.stdout.read(_LONGEST):
        blocks.append(block)
        size += len(block)
        if size > _LONGEST:
            return None
    return b"".join(blocks)
