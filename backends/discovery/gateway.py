"""A FIRST gateway: several clusters' models behind one address, one token and one quota.

Its error language is in ``failures``. Answers are read whole: a stream through it hides errors
in texts that look like answers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import orjson

from ..core.errors import ConfigurationError
from ..fleet.address import ApiKey, EndpointSpec, base_url
from ..fleet.answer import Complaint, RawAnswer
from ..fleet.endpoint import Endpoint
from ..fleet.policy import FleetPolicy
from ..fleet.transport import Transport
from .probe import Found, describe_error

_OK: Final = 200
_UNAUTHORIZED: Final = 401
_CHAT: Final = "/v1/chat/completions"
_PATH: Final = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Gateway:
    """Deployments behind one gateway.

    Attributes:
        base: Its address, up to the clusters' names.
        specs: One endpoint per deployment, each with the label ``cluster/framework``.
    """

    base: str
    specs: tuple[EndpointSpec, ...]

    @classmethod
    def of(cls, base: str, paths: Sequence[str], key: ApiKey, proxied: bool = True) -> Gateway:
        """Name the deployments.

        Args:
            base: The gateway's address.
            paths: ``cluster/framework`` of each deployment.
            key: The token, or where it comes from.
            proxied: Whether the environment's proxy variables count.

        Raises:
            ConfigurationError: The address is no URL, or a path is none.
        """
        root = base_url(base.rstrip("/")).removesuffix("/v1")
        for path in paths:
            if not _PATH.fullmatch(path):
                msg = f"{path!r} is no cluster/framework, such as sophia/vllm"
                raise ConfigurationError(msg)
        return cls(
            root,
            tuple(
                EndpointSpec(f"{root}/{path}/v1", key, label=path, proxied=proxied)
                for path in dict.fromkeys(paths)
            ),
        )

    async def discover(self, timeout_s: float = 10.0) -> list[Found]:
        """Ask which models the deployments serve, by one request.

        Args:
            timeout_s: Longest wait for the answer, in seconds.

        Returns:
            One finding per deployment.

        Raises:
            RunStoppedError: The token cannot be fetched.
        """
        first, transport = Endpoint(self.specs[0]), Transport(FleetPolicy())
        started = time.monotonic()
        try:
            headers = await first.headers()
            answer = await self._ask(transport, first, headers, timeout_s)
            if answer.status == _UNAUTHORIZED and await first.rekeyed(headers):
                answer = await self._ask(transport, first, await first.headers(), timeout_s)
        except TimeoutError:
            return self._lost(f"no answer within {timeout_s:g} s")
        except aiohttp.ClientError as error:
            return self._lost(describe_error(error))
        finally:
            await transport.aclose()
        clusters = _clusters(answer)
        if clusters is None:
            return self._lost(_refusal(answer))
        seconds = time.monotonic() - started
        return [_found(spec, clusters, seconds) for spec in self.specs]

    async def _ask(
        self, transport: Transport, first: Endpoint, headers: Mapping[str, str], timeout_s: float
    ) -> RawAnswer:
        url = f"{self.base}/list-endpoints"
        return await transport.get(url, headers, timeout_s, first.spec.proxied)

    def _lost(self, error: str) -> list[Found]:
        return [Found(spec, spec.label or spec.url, error=error) for spec in self.specs]


def _clusters(answer: RawAnswer) -> Mapping[str, Any] | None:
    if answer.status != _OK:
        return None
    try:
        document = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return None
    clusters = document.get("clusters") if isinstance(document, dict) else None
    return clusters if isinstance(clusters, dict) else None


def _refusal(answer: RawAnswer) -> str:
    complaint = Complaint.read(answer.masked().body)
    hint = " (is the token still valid?)" if answer.status == _UNAUTHORIZED else ""
    if complaint.html:
        hint = " (a web page came: check base_url and any proxy in between)"
    return f"HTTP {answer.status}: {complaint.message}{hint}"


def _found(spec: EndpointSpec, clusters: Mapping[str, Any], seconds: float) -> Found:
    label = spec.label or ""
    cluster, _, framework = label.partition("/")
    frameworks = (clusters.get(cluster) or {}).get("frameworks") or {}
    if framework not in frameworks:
        known = [f"{c}/{f}" for c, v in clusters.items() for f in v.get("frameworks") or ()]
        return Found(spec, label, error=f"the gateway has {', '.join(known) or 'nothing'}")
    offered = frameworks[framework]
    if _CHAT not in (offered.get("endpoints") or [_CHAT]):
        return Found(spec, label, error="it offers no chat completions")
    models = tuple(m for m in offered.get("models") or () if isinstance(m, str))
    return Found(spec, label, models, latency_s=seconds)
