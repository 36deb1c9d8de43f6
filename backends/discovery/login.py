"""Access tokens of gateways: from a command, from the facility's tool, from the environment."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from abc import ABC, abstractmethod
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Mapping
from typing import Final

from ..core.errors import ConfigurationError, FanfoldError, MissingExtraError, RunStoppedError

_LOG: Final = logging.getLogger(__name__)
_LONGEST: Final = 64 * 1024
"""Limit of bytes that a command may print; a token takes a few thousand."""
_COMMAND_AGE_S: Final = 3600.0
"""Seconds after which a command is run again."""
TOKEN_VARIABLE: Final = "FIRST_API_KEY"
"""Environment variable with a token, used if the facility's tool gives none."""


class AccessToken(ABC):
    """The key of an endpoint that is fetched when it is first needed, and renewed.

    It is fetched once, no matter how many calls need it: again when it is old, and once after a
    refusal. An old key is used on if no new one can be fetched.

    Args:
        where: The setting that it comes from, for messages.
        max_age_s: Seconds after which it is fetched again.
        pause_s: A key that is refused within so many seconds of the last refusal is not fetched
            again: gateways remember refusals for a minute, and only a person can log in again.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self,
        where: str,
        max_age_s: float,
        pause_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._where = where
        self._max_age_s = max_age_s
        self._pause_s = pause_s
        self._clock = clock
        self._key: str | None = None
        self._fetched = 0.0
        self._renewed: float | None = None
        self._lock = asyncio.Lock()

    async def __call__(self) -> str:
        """Return the key; the first call fetches it.

        Raises:
            FanfoldError: It cannot be fetched.
        """
        if self._key is not None and not self._is_old:
            return self._key
        async with self._lock:
            if self._key is None:
                self._key = await self._fetch()
                self._fetched = self._clock()
            elif self._is_old:
                self._fetched = self._clock()
                try:
                    self._key = await self._fetch()
                except FanfoldError as error:
                    _LOG.warning("the access token is not renewed: %s", error.message)
            return self._key

    @property
    def _is_old(self) -> bool:
        return self._clock() - self._fetched >= self._max_age_s

    async def renew(self, refused: str) -> None:
        """Fetch another key after a refusal, unless another call already did.

        Args:
            refused: The key that was refused.

        Raises:
            FanfoldError: It cannot be fetched.
        """
        async with self._lock:
            now = self._clock()
            recently = self._renewed is not None and now - self._renewed < self._pause_s
            if refused != self._key or recently:
                return
            self._renewed = now
            self._key = await self._fetch(refused)
            self._fetched = self._clock()
            if self._key != refused:
                _LOG.info("%s: key refused; fetched a new one", self._where)

    @abstractmethod
    async def _fetch(self, refused: str | None = None) -> str:
        """Fetch the key; ``refused`` is one that does not work any more."""


class CommandToken(AccessToken):
    """The key of an endpoint, printed by a command of the user's.

    The command runs in a subprocess without a shell; its output is never shown.

    Args:
        command: The command line.
        where: The setting that holds it, for messages.
        timeout_s: Longest time that it may take, in seconds.
        pause_s: See `AccessToken`.
        clock: Monotonic time in seconds.

    Raises:
        ConfigurationError: The command line is malformed.
    """

    def __init__(
        self,
        command: str,
        where: str,
        timeout_s: float = 60.0,
        pause_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(where, _COMMAND_AGE_S, pause_s, clock)
        try:
            self._command = shlex.split(command)
        except ValueError as error:
            raise ConfigurationError(f"{where}: invalid command line: {error}") from None
        if not self._command:
            raise ConfigurationError(f"{where}: is empty")
        self._timeout_s = timeout_s

    async def _fetch(self, refused: str | None = None) -> str:  # noqa: ARG002 - runs it anyway
        try:
            child = await asyncio.create_subprocess_exec(
                *self._command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL
            )
        except OSError as error:
            raise self._make_error(f"cannot be started: {error.strerror}") from None
        try:
            async with asyncio.timeout(self._timeout_s):
                output = await _read_output(child)
                if output is not None:
                    await child.wait()
        except TimeoutError:
            raise self._make_error(f"printed no key within {self._timeout_s:g} s") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if output is None:
            raise self._make_error(f"printed more than {_LONGEST:,} bytes")
        if child.returncode:
            raise self._make_error(f"failed with exit status {child.returncode}")
        key = output.decode("ascii", "replace").strip()
        if not _is_key(key):
            raise self._make_error("did not print exactly one key")
        return key

    def _make_error(self, problem: str) -> RunStoppedError:
        return RunStoppedError(
            f"{self._where}: the command {self._command[0]!r} {problem}; run it manually to see "
            "why (you may need to log in again)"
        )


def _is_key(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


async def _read_output(child: asyncio.subprocess.Process) -> bytes | None:
    """Return the output of a command, or None as soon as it is too long for a key."""
    assert child.stdout is not None, "it is a pipe"
    blocks, size = list[bytes](), 0
    while block := await child.stdout.read(_LONGEST):
        blocks.append(block)
        size += len(block)
        if size > _LONGEST:
            return None
    return b"".join(blocks)


class LoginToken(AccessToken):
    """The access token of a user who has logged in with the facility's tool, ``alcf-tokens``.

    If there is none, the token in the variable ``FIRST_API_KEY`` is used.

    Args:
        where: The setting that it belongs to, for messages.
        environment: The variables.
        max_age_s: Seconds after which the tool is asked again; it renews a token that expires.
        pause_s: See `AccessToken`.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self,
        where: str,
        environment: Mapping[str, str] | None = None,
        max_age_s: float = 600.0,
        pause_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(where, max_age_s, pause_s, clock)
        self._environment = os.environ if environment is None else environment

    async def _fetch(self, refused: str | None = None) -> str:
        try:
            return await asyncio.to_thread(read_login_token, refused)
        except (MissingExtraError, RunStoppedError) as error:
            reason = error.message.removesuffix(".")
            given = self._environment.get(TOKEN_VARIABLE, "").strip()
            if not given:
                raise RunStoppedError(
                    f"{self._where}: no access token: {reason}; or set {TOKEN_VARIABLE}, or "
                    f"{self._where}.token or .token_command"
                ) from None
        if not _is_key(given):
            raise RunStoppedError(f"{self._where}: {TOKEN_VARIABLE} is not a token")
        return given


def read_login_token(refused: str | None = None) -> str:
    """Return the access token that the facility's tool has stored, renewed if needed; blocks.

    It never starts a login.

    Args:
        refused: A token that the gateway has refused: the tool then renews it before its time.

    Raises:
        MissingExtraError: The tool is not installed.
        RunStoppedError: Nobody has logged in, or the login is too old.
    """
    try:
        # slow to import, and needed for this gateway only
        from alcf_tokens.auth import (  # noqa: PLC0415
            AuthError,
            ServiceName,
            get_access_token,
            get_service_authorizer,
        )
    except ImportError:
        raise MissingExtraError("the login of the FIRST gateway", "first") from None
    try:
        token = get_access_token(ServiceName.inference)
        if token == refused:
            authorizer = get_service_authorizer(ServiceName.inference)
            authorizer.handle_missing_authorization()
            token = (authorizer.get_authorization_header() or "").removeprefix("Bearer ")
    except AuthError as error:
        raise RunStoppedError(f"alcf-tokens: {error}") from None
    except Exception as error:  # noqa: BLE001 - Globus' SDK; its text may hold a token
        code = getattr(error, "code", None)
        reason = f"{type(error).__name__}{f' ({code})' if isinstance(code, str) else ''}"
        raise RunStoppedError(
            f"alcf-tokens: the token cannot be renewed: {reason}; log in again: alcf-tokens login"
        ) from None
    if not isinstance(token, str) or not _is_key(token):
        raise RunStoppedError("alcf-tokens returned no token; log in again: alcf-tokens login")
    return token
