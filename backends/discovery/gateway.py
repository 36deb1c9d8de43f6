"""The FIRST gateway, and tokens from a command."""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import orjson

from ..core.errors import ConfigurationError, RunStoppedError
from ..fleet.endpoint import ApiKey, Endpoint, EndpointSpec, normalize_base_url
from ..fleet.failures import ErrorBody, HTTPAnswer
from ..fleet.policy import FleetPolicy
from ..fleet.transport import Transport
from .probe import ProbeResult, describe_error

_OK: Final = 200
_UNAUTHORIZED: Final = 401
_CHAT: Final = "/v1/chat/completions"
DEFAULT_TOKENS: Final = 60_000.0
"""Tokens of a model per minute that the gateway allows a user, unless it reports another limit."""
_PATH: Final = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Gateway:
    """Deployments behind one gateway.

    Attributes:
        base: Its address, without cluster and framework.
        specs: One endpoint per deployment, each with the label ``cluster/framework``.
    """

    base: str
    specs: tuple[EndpointSpec, ...]

    @classmethod
    def from_paths(
        cls, base: str, paths: Sequence[str], key: ApiKey, proxied: bool = True
    ) -> Gateway:
        """Build a gateway from the paths of its deployments.

        Args:
            base: The gateway's address.
            paths: ``cluster/framework`` of each deployment.
            key: The token, or where it comes from.
            proxied: Whether the environment's proxy variables apply.

        Raises:
            ConfigurationError: The address or a path is malformed.
        """
        root = normalize_base_url(base.rstrip("/")).removesuffix("/v1")
        for path in paths:
            if not _PATH.fullmatch(path):
                msg = f"{path!r} is not a cluster/framework path, such as sophia/vllm"
                raise ConfigurationError(msg)
        return cls(
            root,
            tuple(
                EndpointSpec(f"{root}/{path}/v1", key, label=path, proxied=proxied)
                for path in dict.fromkeys(paths)
            ),
        )

    async def probe_models(self, timeout_s: float = 10.0) -> list[ProbeResult]:
        """Ask in one request which models the deployments serve.

        Args:
            timeout_s: Longest wait for the answer, in seconds.

        Returns:
            One result per deployment.

        Raises:
            RunStoppedError: The token cannot be fetched.
        """
        first, transport = Endpoint(self.specs[0]), Transport(FleetPolicy())
        started = time.monotonic()
        try:
            headers = await first.headers()
            answer = await self._ask(transport, first, headers, timeout_s)
            if answer.status == _UNAUTHORIZED and await first.renew_key(headers):
                answer = await self._ask(transport, first, await first.headers(), timeout_s)
        except TimeoutError:
            return self._make_unreachable(f"no answer within {timeout_s:g} s")
        except aiohttp.ClientError as error:
            return self._make_unreachable(describe_error(error))
        finally:
            await transport.aclose()
        clusters = _clusters(answer)
        if clusters is None:
            return self._make_unreachable(_refusal(answer))
        seconds = time.monotonic() - started
        return [_make_result(spec, clusters, seconds) for spec in self.specs]

    async def _ask(
        self, transport: Transport, first: Endpoint, headers: Mapping[str, str], timeout_s: float
    ) -> HTTPAnswer:
        url = f"{self.base}/list-endpoints"
        return await transport.get(url, headers, timeout_s, first.spec.proxied)

    def _make_unreachable(self, error: str) -> list[ProbeResult]:
        return [ProbeResult(spec, spec.label or spec.url, error=error) for spec in self.specs]


def _clusters(answer: HTTPAnswer) -> Mapping[str, Any] | None:
    if answer.status != _OK:
        return None
    try:
        document = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return None
    clusters = document.get("clusters") if isinstance(document, dict) else None
    return clusters if isinstance(clusters, dict) else None


def _refusal(answer: HTTPAnswer) -> str:
    error = ErrorBody.parse(answer.mask_keys().body)
    hint = " (is the token still valid?)" if answer.status == _UNAUTHORIZED else ""
    if error.html:
        hint = " (the answer is a web page: check base_url and any proxy)"
    return f"HTTP {answer.status}: {error.message}{hint}"


def _make_result(spec: EndpointSpec, clusters: Mapping[str, Any], seconds: float) -> ProbeResult:
    label = spec.label or ""
    cluster, _, framework = label.partition("/")
    frameworks = (clusters.get(cluster) or {}).get("frameworks") or {}
    if framework not in frameworks:
        known = [f"{c}/{f}" for c, v in clusters.items() for f in v.get("frameworks") or ()]
        return ProbeResult(spec, label, error=f"the gateway has {', '.join(known) or 'nothing'}")
    offered = frameworks[framework]
    if _CHAT not in (offered.get("endpoints") or [_CHAT]):
        return ProbeResult(spec, label, error="the deployment offers no chat completions")
    models = tuple(m for m in offered.get("models") or () if isinstance(m, str))
    return ProbeResult(spec, label, models, latency_s=seconds)


_LOG: Final = logging.getLogger(__name__)
_LONGEST: Final = 64 * 1024
"""Limit of bytes that a command may print; a token takes a few thousand."""


class CommandToken:
    """The key of an endpoint, printed by a command of the user's.

    The command runs in a subprocess without a shell; its output is never shown. It runs once, no
    matter how many calls need the key.

    Args:
        command: The command line.
        where: The setting that holds it, for messages.
        timeout_s: Longest time that it may take, in seconds.
        pause_s: A key that is refused within so many seconds of the last refusal is not fetched
            again: gateways remember refusals for a minute, and only a person can log in again.
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
        try:
            self._command = shlex.split(command)
        except ValueError as error:
            raise ConfigurationError(f"{where}: invalid command line: {error}") from None
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
        """Return the key; the first call runs the command.

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
        """Run the command again after a refusal, unless another call already did.

        Args:
            refused: The key that was refused.

        Raises:
            RunStoppedError: The command failed.
        """
        async with self._lock:
            now = self._clock()
            recently = self._renewed is not None and now - self._renewed < self._pause_s
            if refused != self._key or recently:
                return
            self._renewed = now
            self._key = await self._fetch()
            _LOG.info("%s: key refused; fetched a new one", self._where)

    async def _fetch(self) -> str:
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
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise self._make_error("did not print exactly one key")
        return key

    def _make_error(self, problem: str) -> RunStoppedError:
        return RunStoppedError(
            f"{self._where}: the command {self._command[0]!r} {problem}; run it manually to see "
            "why (you may need to log in again)"
        )


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
