"""The batch mode of the FIRST gateway: submit, find, poll."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from ..core.connection_errors import describe_connection_error
from ..core.errors import AuthenticationError, EndpointError, RunStoppedError
from ..core.lazy_tls import aiohttp
from ..core.values import parse_json
from ..fleet.endpoint import Endpoint
from ..fleet.failures import ErrorBody, HTTPAnswer, shorten
from ..fleet.transport import Transport

_OK: Final = 200
_ACCEPTED: Final = frozenset({200, 201, 202})
_UNAUTHORIZED: Final = 401
_FORBIDDEN: Final = 403
_TOO_MANY: Final = 429
_TIMED_OUT: Final = 408
_SERVER_ERROR: Final = 500
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""A batch's id becomes a part of a URL."""
_TIMEOUT_S: Final = 60.0
_WAITING: Final = frozenset({"quota_exceeded", "cluster_under_maintenance", "too_many_requests"})
"""Codes of refusals that end by themselves."""
_ONGOING: Final = "batch_ongoing"
"""The code for an input file that another batch has: as no file is used twice, it is the same."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What became of a submission.

    Attributes:
        batch_id: The batch, if it was accepted.
        refusal: Why it was not, in words; None if that is unknown.
        is_final: Whether the service will not accept it later either.
        problem: Why it is unknown.
    """

    batch_id: str | None = None
    refusal: str | None = None
    is_final: bool = False
    problem: str = ""


class BatchService:
    """The batch routes of one deployment of a FIRST gateway.

    Args:
        endpoint: The deployment, ``…/cluster/framework/v1``.
        transport: The connections.
    """

    def __init__(self, endpoint: Endpoint, transport: Transport) -> None:
        self._endpoint, self._transport = endpoint, transport
        self._submit_url = f"{endpoint.url}/batches"
        self._root = endpoint.url.removesuffix("/v1").rsplit("/", 2)[0]

    @property
    def label(self) -> str:
        """Return the deployment's name for messages."""
        return self._endpoint.label

    async def submit(self, model: str, input_file: str, output_folder: str) -> Submission:
        """Submit a file, once.

        Raises:
            RunStoppedError: The token is refused, or cannot be fetched.
        """
        body = {"model": model, "input_file": input_file, "output_folder_path": output_folder}
        try:
            answer = await self._ask(self._submit_url, orjson.dumps(body))
        except aiohttp.ClientConnectorError as error:  # nothing was sent
            return Submission(refusal=describe_connection_error(error))
        except (aiohttp.ClientError, TimeoutError) as error:
            return Submission(problem=describe_connection_error(error))
        if answer.status in _ACCEPTED:
            name = _find_id(_parse(answer.body))
            return Submission(name, problem="" if name else "its answer names no batch")
        return self._read_refusal(answer)

    def _read_refusal(self, answer: HTTPAnswer) -> Submission:
        body = ErrorBody.parse(answer.mask_keys().body)
        text = f"HTTP {answer.status} {body.code or ''}".rstrip() + f": {body.message}"
        if body.code == _ONGOING:
            return Submission(problem=text)
        if body.code in _WAITING or answer.status == _TOO_MANY:
            return Submission(refusal=text)
        if answer.status >= _SERVER_ERROR or answer.status == _TIMED_OUT:
            return Submission(problem=text)
        return Submission(refusal=text, is_final=True)

    async def find(self, input_file: str) -> str | None:
        """Return the batch that has an input file, or None if the service lists none.

        Raises:
            EndpointError: The list cannot be read.
            RunStoppedError: The token is refused.
        """
        listed = await self._get(f"{self._root}/v1/batches")
        if not isinstance(listed, list):
            raise self._make_error("its list of batches is not a list")
        for entry in listed:
            if isinstance(entry, dict) and entry.get("input_file") == input_file:
                if (name := _find_id(entry)) is None:
                    raise self._make_error(f"its list names no id for {input_file}")
                return name
        return None

    async def get_status(self, batch_id: str) -> str:
        """Return the state of a batch: ``pending``, ``running``, ``failed`` or ``completed``.

        Raises:
            EndpointError: The state cannot be read.
            RunStoppedError: The token is refused.
        """
        status = await self._get(f"{self._root}/v1/batches/{batch_id}")
        if isinstance(status, dict):
            status = status.get("status")
        if not isinstance(status, str):
            raise self._make_error("the state of a batch is not a text")
        return status

    async def describe_result(self, batch_id: str) -> str:
        """Return what the service says about the result of a batch, for messages.

        Raises:
            RunStoppedError: The token is refused.
        """
        try:
            result = await self._get(f"{self._root}/v1/batches/{batch_id}/result")
        except EndpointError as error:
            return error.message
        return shorten(result)

    def _make_error(self, problem: str) -> EndpointError:
        return EndpointError(f"{self.label}: {problem}", self.label)

    async def _get(self, url: str) -> Any:
        """Return the document at a URL.

        Raises:
            EndpointError: It cannot be read.
            RunStoppedError: The token is refused.
        """
        try:
            answer = await self._ask(url)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._make_error(describe_connection_error(error)) from None
        if answer.status == _OK:
            return _parse(answer.body)
        body = ErrorBody.parse(answer.mask_keys().body)
        kind = AuthenticationError if answer.status == _FORBIDDEN else EndpointError
        msg = f"{self.label}: HTTP {answer.status}: {body.message}"
        raise kind(msg, self.label, answer.status, body.code)

    async def _ask(self, url: str, body: bytes | None = None) -> HTTPAnswer:
        """Send one request; once more with a new token if the first one is refused.

        Raises:
            RunStoppedError: The token is refused.
        """
        headers = await self._endpoint.headers()
        answer = await self._send(url, body, headers)
        if answer.status == _UNAUTHORIZED and await self._endpoint.renew_key(headers):
            answer = await self._send(url, body, await self._endpoint.headers())
        if answer.status == _UNAUTHORIZED:
            text = ErrorBody.parse(answer.mask_keys().body).message
            msg = f"{self.label}: the token is refused: {text}; log in again, then resume the run"
            raise RunStoppedError(msg)
        return answer

    async def _send(self, url: str, body: bytes | None, headers: Mapping[str, str]) -> HTTPAnswer:
        proxied = self._endpoint.spec.proxied
        if body is None:
            return await self._transport.get(url, headers, _TIMEOUT_S, proxied)
        return await self._transport.send(url, body, headers, proxied)


def _parse(body: bytes) -> Any:
    """Return the document of an answer, None if it is no JSON; some are texts that contain JSON."""
    try:
        document = parse_json(body)
        if isinstance(document, str) and document.lstrip()[:1] in {"{", "["}:
            return parse_json(document.encode())
    except (ValueError, RecursionError):
        return None
    return document


def _find_id(document: Any) -> str | None:
    """Return the id in an entry of the list, or in the answer to a submission."""
    if not isinstance(document, dict):
        return None
    names = (document.get("batch_id"), document.get("id"))
    return next((n for n in names if isinstance(n, str) and _ID.fullmatch(n)), None)
